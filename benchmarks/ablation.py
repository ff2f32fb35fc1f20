"""What each part of the method does: `python benchmarks/ablation.py --help` (paper section 4.4, figure 8).

The package's clips are edited in full, without sparse-causal attention (each frame looks at itself only, in tuning
too), without inversion (from seeded noise), and without tuning. The metrics are the demo's own judge's, never CLIP's.

Edits are of two kinds. In the demo's world a complete prompt leaves one appearance (a tiger is one picture), so its
frames agree without looking at each other. An open one leaves the place to the frames, as any prompt leaves much to a
large model; the negative prompt and the guidance keep the inverted latents from settling it.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from common import header, machine
from crossings import DEMO, EDITS, Source, metrics, sources, tuned
from PIL import Image
from tqdm import tqdm

from tav_opt import command, editing, video
from tav_opt.config import EditConfig
from tav_opt.demo import world
from tav_opt.demo.judge import Judge
from tav_opt.demo.places import PLACES
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.files import write_json
from tav_opt.suite.each_frame import without_sparse_causal
from tav_opt.video import contact_sheet

VARIANTS = ("full", "without sparse-causal attention", "without inversion", "without tuning")
FULL, ALONE, FROM_NOISE, UNTUNED = VARIANTS
OPEN_GUIDANCE = 5.0
"""That of pictures from text (benchmarks/quality.py): at the demo's the inverted latents keep the source's place."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Edits of the package's clips by each variant."""

    folder: Path = Path("demo-out/ablation")
    """Tuned clips, sheets and GIFs."""
    out: Path = Path("benchmarks/results/ablation.json")


def main(config: Ablation) -> int:
    """Prints a table for each kind of prompts, and keeps them with a sheet and a GIF of each edit."""
    config.folder.mkdir(parents=True, exist_ok=True)
    judge, found = Judge.open(), dict[str, dict[str, list[dict[str, float]]]]()
    for source in sources():
        for kind, edits in {"complete": complete(source), "open": left_open(source)}.items():
            made = {variant: _edits(source, variant, edits, config.folder) for variant in VARIANTS}
            for variant, clips in made.items():
                judged = [metrics(judge, f, source, edit.prompts[0]) for f, edit in zip(clips, edits, strict=True)]
                found.setdefault(kind, {}).setdefault(variant, []).extend(judged)
            for index, edit in enumerate(edits):
                shown = {variant: clips[index] for variant, clips in made.items()}
                _show(source, shown, edit, config.folder / f"{source.name}-{kind}-{index}")
    means = {kind: {variant: _mean(of) for variant, of in variants.items()} for kind, variants in found.items()}
    for kind, rows in means.items():
        _print(f"ablation: {len(found[kind][FULL])} edits a variant, {kind} prompts, means", rows)
    content = {"command": " ".join(sys.argv), "machine": machine(), "means": means, "edits": found}
    write_json(config.out, content)
    return 0


def complete(source: Source) -> list[EditConfig]:
    """The demo's edits of the subject, the place and the style."""
    return [DEMO.edit_config(world.prompt(source.edited(change))) for change in EDITS[source.name][::2]]


def left_open(source: Source) -> list[EditConfig]:
    """Edits to a subject, the source's own and another, in any place but the source's."""
    away = {"negative_prompt": PLACES[source.scene.place][0], "guidance_scale": OPEN_GUIDANCE}
    subjects = (source.scene.subject, EDITS[source.name][0]["subject"])
    return [replace(DEMO.edit_config(world.subject_phrase(name)), **away) for name in subjects]


def _edits(source: Source, variant: str, edits: list[EditConfig], folder: Path) -> list[np.ndarray]:
    """The clip tuned and edited by a variant: uint8 (f, H, W, 3) an edit."""
    suffix = {ALONE: "-alone", UNTUNED: "-untuned"}.get(variant, "")
    untrained = {"steps": 1, "lr": 0.0} if variant == UNTUNED else {}
    with without_sparse_causal() if variant == ALONE else nullcontext():
        engine = open_checkpoint(tuned(source, folder / f"{source.name}{suffix}", **untrained))
        configs = [replace(edit, inversion=variant != FROM_NOISE) for edit in edits]
        return [editing.edit(engine, c)[0] for c in tqdm(configs, desc=f"{source.name} {variant}", disable=None)]


def _mean(judged: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([figures[name] for figures in judged])) for name in judged[0]}


def _print(title: str, rows: dict[str, dict[str, float]]) -> None:
    names = next(iter(rows.values()))
    print(header(title))
    print(f"\n| variant | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for variant, row in rows.items():
        print(f"| {variant} | {' | '.join(f'{value:.3f}' for value in row.values())} |")


def _show(source: Source, made: dict[str, np.ndarray], edit: EditConfig, file: Path) -> None:
    clips, captions = [source.clip.frames, *made.values()], [source.caption, *made]
    captions[1] = f"full: {edit.prompts[0]}" + (f", not {edit.negative_prompt}" if edit.negative_prompt else "")
    Image.fromarray(contact_sheet.contact_sheet(clips, captions)).save(file.with_suffix(".png"))
    video.write(file.with_suffix(".gif"), contact_sheet.side_by_side(clips, captions), source.clip.fps)


if __name__ == "__main__":
    sys.exit(command.run("ablation", lambda arguments: main(tyro.cli(Ablation, args=arguments))))
