"""A suite on the demo's world: 16 clips that no setting was chosen on, 64 edits, six methods.

`python benchmarks/demo_suite.py --folder demo-out/suite` draws the clips (npm fetches the animations) and writes
`suite.yaml` beside them, as `benchmarks/demo_suite.yaml` has it; then `tav-opt evaluate demo-out/suite/suite.yaml`, and
`--results runs` keeps the figures of its report.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import yaml
from common import machine

from tav_opt import command
from tav_opt.demo import subjects, world
from tav_opt.demo.clips import CLIPS, FRAMES, Crossing, animate, write_mp4
from tav_opt.demo.emoji import JUDGED
from tav_opt.demo.places import PLACES, PLAIN
from tav_opt.demo.run import SMALL_GUIDANCE, SMALL_LR
from tav_opt.demo.world import Scene
from tav_opt.files import check_place, read_object, whole, write_json
from tav_opt.metrics.clip_encoder import DEMO

SEED = 1919
"""Of places, paths and edits; drawn once, and never again."""
SUBJECTS = (
    *"tiger dog cat penguin panda elephant frog cow pig sheep camel rooster turtle octopus snail".split(),
    "racing car",
)
"""Judged subjects that have an animation and are in none of the package's clips."""
SEEN = tuple(place for place in PLACES if place not in PLAIN)
EDITED = ("subject", "background", "style", "mixed")
HEAD = """# Written by benchmarks/demo_suite.py, which draws the clips too. It is held out from all choices:
# none of these settings may be changed after it was first run. 8 frames and 20 steps, so that two processors can do it.
"""
SETTINGS: dict[str, Any] = {
    "model": "model",
    "clip": {"frames": 8, "stride": 3, "height": world.SIZE, "width": world.SIZE},
    "tune": {"steps": 150, "lr": SMALL_LR, "inversion_steps": 20, "save_every": 50},
    "edit": {"steps": 20, "guidance_scale": SMALL_GUIDANCE},
    "metrics": {"clip": "clip_model"},
}
METHODS: dict[str, Any] = {
    "ours": {},
    "per-frame": {},
    "plug-and-play": {},
    "from-noise": {"edit": {"inversion": False}},
    "untuned": {"tune": {"steps": 1, "lr": 0.0}},
    "each-frame-alone": {"attention": "each-frame"},
}
"""Ours, the image baselines, and the ablation's variants."""


@dataclass(frozen=True, kw_only=True)
class DemoSuite:
    """Draw the clips of the suite and write its file."""

    folder: Path = Path("demo-out/suite")
    """Where the clips and suite.yaml go, with links to the package's model and encoder."""
    results: Path | None = None
    """Folder of results of `tav-opt evaluate`; its report's figures are written, and nothing is drawn."""
    out: Path = Path("benchmarks/results/demo_suite.json")
    """Where the figures go."""


def crossings() -> list[Crossing]:
    """A clip of each subject, its place and path drawn."""
    assert not set(SUBJECTS) & {clip.subject for clip in CLIPS} and set(SUBJECTS) <= set(JUDGED)
    rng = np.random.default_rng(SEED)
    return [
        Crossing(
            name=subject.replace(" ", "-"),
            subject=subject,
            place=str(rng.choice(SEEN)),
            scale=round(float(rng.uniform(0.58, 0.66)), 2),
            path=(round(float(rng.uniform(0.64, 0.7)), 2), round(float(rng.uniform(0.3, 0.36)), 2)),
            hops=int(rng.integers(0, 4)),
        )
        for subject in SUBJECTS
    ]


def edits(crossing: Crossing, number: int) -> list[dict[str, str]]:
    """One of each of the paper's kinds: prompts that say what stays and what changes."""
    rng = np.random.default_rng((SEED, number))
    source = Scene(subject=crossing.subject, place=crossing.place)
    other = lambda of, than: str(rng.choice([name for name in of if name != than]))  # noqa: E731
    scenes = {
        "subject": replace(source, subject=other(JUDGED, source.subject)),
        "background": replace(source, place=other(SEEN, source.place)),
        "style": replace(source, style=other(world.STYLES, "plain")),
        "mixed": replace(source, subject=other(JUDGED, source.subject), place=other(SEEN, source.place)),
    }
    return [{"prompt": world.prompt(scenes[kind]), "category": kind} for kind in EDITED]


def suite() -> str:
    """The suite's file."""
    videos = [
        {"video": f"{clip.name}.mp4", "caption": clip.caption, "edits": edits(clip, number)}
        for number, clip in enumerate(crossings())
    ]
    told = yaml.safe_dump(SETTINGS | {"videos": videos, "methods": METHODS}, sort_keys=False, width=120)
    return HEAD + told


def keep(results: Path, out: Path) -> None:
    """The figures of a report: tables, and every edit's own."""
    told = read_object(results / "report" / "report.json")
    shown = ("method", "video", "edit", "prompt", "values")
    edits = [{name: edit[name] for name in shown} for edit in told["edits"]]
    names = ("networks", "table", "by category", "faults", "not done for them")
    write_json(out, {"machine": machine()} | {name: told[name] for name in names} | {"edits": edits})


def main(config: DemoSuite) -> int:
    if config.results is not None:
        keep(config.results, config.out)
        return 0
    check_place(config.folder / "suite.yaml")
    config.folder.mkdir(parents=True, exist_ok=True)
    for number, crossing in enumerate(crossings()):
        sprites, rate = subjects.animation(JUDGED[crossing.subject])
        frames, _ = animate(crossing, sprites, seed=SEED + number)
        write_mp4(config.folder / f"{crossing.name}.mp4", frames, max(1, round(rate * FRAMES / len(sprites))))
    for name, place in (("model", DEMO.with_name("model")), ("clip_model", DEMO)):
        link = config.folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(place)
    with whole(config.folder / "suite.yaml") as beside:
        beside.write_text(suite(), encoding="utf-8")
    print(config.folder / "suite.yaml")
    return 0


def run(arguments: Sequence[str]) -> int:
    return main(tyro.cli(DemoSuite, prog="python benchmarks/demo_suite.py", description=__doc__, args=arguments))


if __name__ == "__main__":
    sys.exit(command.run("python benchmarks/demo_suite.py", run))
