"""Whether edits follow maps that go another way than their source: `python benchmarks/controlled.py --help`.

The package's clips all cross from right to left. They are edited with the demo's adapter along drawn ways and along
the silhouettes of another clip that is played backwards; a locator finds the subject, the dual encoder what it is.
Exit status 1 where a goal is missed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import Figure, header, machine
from crossings import DEMO, PACKAGE, Source, right_frames, sources, tuned
from PIL import Image

from tav_opt import command, editing, video
from tav_opt.config import Control, EditConfig
from tav_opt.demo import clips, subjects, ways, world
from tav_opt.demo.emoji import FURTHER, JUDGED
from tav_opt.demo.judge import Judge, track_correlation
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.files import write_json
from tav_opt.video import contact_sheet

NAME = "place"
"""Of the control."""
BACKWARDS = " backwards"
"""A way of this ending is that of a clip's own subject."""
Case = tuple[str, dict[str, str], str]
"""Clip, what is changed, and the way that the subject shall go."""
EDITS: tuple[Case, ...] = (
    ("leopard", {"subject": "tiger"}, "there and back"),
    ("leopard", {"place": "snow"}, "rabbit backwards"),
    ("leopard", {"subject": "dog", "place": "forest"}, "back"),
    ("rabbit", {"subject": "cat"}, "there and back"),
    ("rabbit", {"place": "snow"}, "horse backwards"),
    ("rabbit", {"subject": "pig", "place": "beach"}, "bounce"),
    ("horse", {"subject": "zebra"}, "back"),
    ("horse", {"place": "beach"}, "chick backwards"),
    ("horse", {"subject": "cow", "place": "meadow"}, "there and back"),
    ("chick", {"subject": "penguin"}, "bounce"),
    ("chick", {"place": "beach"}, "leopard backwards"),
    ("chick", {"subject": "owl"}, "back"),
)
"""What is reported."""
TRIALS: tuple[Case, ...] = (
    ("leopard", {"subject": "elephant"}, "to and fro"),
    ("rabbit", {"place": "night"}, "circle"),
    ("horse", {"subject": "camel"}, "to and fro"),
    ("chick", {"subject": "snowman", "place": "snow"}, "circle"),
)
"""What settings were chosen by: other prompts, other ways."""


@dataclass(frozen=True, kw_only=True)
class Controlled:
    """Edits the package's clips along ways that they do not go."""

    trials: bool = False
    """The trials in place of the edits that are reported; their figures are printed, not kept."""
    steps: int = 20
    """DDIM steps of sampling."""
    guidance: float = 2.5
    scale: float = 1.5
    end: float = 1.0
    """Share of the steps after which the maps are let go."""
    inversion: bool = True
    """Begin with the inverted source, though it holds where its subject is; False: with seeded noise."""
    adapter: Path = PACKAGE / "control"
    folder: Path = Path("demo-out/quality")
    """Tuned clips, and the sheets."""
    out: Path = Path("benchmarks/results/controlled.json")

    def edit(self, prompt: str) -> EditConfig:
        """The demo's, with the maps."""
        return replace(
            DEMO.edit_config(prompt),
            steps=self.steps,
            inversion_steps=None,
            guidance_scale=self.guidance,
            inversion=self.inversion,
            controls=(Control(name=NAME, scale=self.scale, end=self.end),),
        )


def main(config: Controlled) -> int:
    """Prints a row an edit and the figures, keeps both and a sheet a clip; returns the exit status."""
    judge, rows = Judge.open(), list[dict[str, Any]]()
    for source in sources():
        cases = [case for case in (TRIALS if config.trials else EDITS) if case[0] == source.name]
        engine = open_checkpoint(tuned(source, config.folder / source.name), adapters={NAME: config.adapter})
        sheet, captions = [source.clip.frames], [source.caption]
        for _, change, name in cases:
            prompt, followed = world.prompt(source.edited(change)), way(name)
            frames = editing.edit(engine, config.edit(prompt), maps={NAME: followed})[0]
            rows.append(judged(judge, source, change, frames, followed) | {"prompt": prompt, "way": name})
            print(rows[-1], flush=True)
            _keep(config, rows)
            sheet += [followed, frames]
            captions += [name, prompt]
        page = Image.fromarray(contact_sheet.contact_sheet(sheet, captions))
        page.save(config.folder / f"controlled-{source.name}.png")
        together = contact_sheet.side_by_side(sheet[:3], captions[:3])
        video.write(config.folder / f"controlled-{source.name}.gif", together, source.clip.fps)
    figures = summed(rows)
    print("\n| figure | measured | goal | met |\n|---|---:|---|---|")
    print("\n".join(map(str, figures)))
    print(header("\nedits that follow maps"))
    return int(not all(figure.met for figure in figures))


def _keep(config: Controlled, rows: list[dict[str, Any]]) -> None:
    """What came so far; of trials nothing."""
    if not config.trials:
        told = {"command": " ".join(sys.argv), "machine": machine(), "rows": rows}
        write_json(config.out, told | {"figures": [vars(figure) for figure in summed(rows)]})


def way(name: str) -> np.ndarray:
    """Maps uint8 (f, H, W, 3) of a way; those of another clip's silhouettes need its animation (npm)."""
    if not name.endswith(BACKWARDS):
        return ways.along(ways.WAYS[name], clips.FRAMES, world.SIZE)
    (crossing,) = (one for one in clips.CLIPS if one.name == name.removesuffix(BACKWARDS))
    sprites, _ = subjects.animation((JUDGED | FURTHER)[crossing.subject])
    return clips.silhouettes(crossing, sprites)[::-1].copy()


def judged(
    judge: Judge, source: Source, change: dict[str, str], frames: np.ndarray, followed: np.ndarray
) -> dict[str, Any]:
    """Whether an edit shows what was asked for, and whose way its subject goes."""
    found, asked = judge.track(frames), ways.middles(followed)
    return {
        "right frames": right_frames(judge, frames, source, change),
        "track with the maps'": track_correlation(found, asked),
        "track with the source's": track_correlation(found, source.track),
        "maps' with the source's": track_correlation(asked, source.track),
        "pixels from the maps' middle": float(np.linalg.norm(found - asked, axis=1).mean()),
    }


def summed(rows: Sequence[dict[str, Any]]) -> list[Figure]:
    """The means, against their goals."""
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name not in ("prompt", "way")}
    right, with_maps, with_source = (mean[name] for name in list(mean)[:3])
    figures = [
        Figure(name=f"right target, frames of {len(rows)} edits", value=100 * right, unit="%", goal="≥ 85 %",
               met=right >= 0.85),
        Figure(name="track with the maps'", value=with_maps, unit="", goal="≥ 0.9", met=with_maps >= 0.9),
        Figure(name="track with the source's", value=with_source, unit="", goal="< 0.3", met=with_source < 0.3),
    ]  # fmt: skip
    rest = ((name, mean[name]) for name in list(mean)[3:])
    return figures + [Figure(name=name, value=value, unit="", goal="", met=True) for name, value in rest]


if __name__ == "__main__":
    sys.exit(command.run("controlled", lambda arguments: main(tyro.cli(Controlled, args=arguments))))
