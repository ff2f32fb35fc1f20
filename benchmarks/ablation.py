"""What each part of the method does: `python benchmarks/ablation.py --help` (paper section 4.4, figure 8).

The package's clips are edited in full, without sparse-causal attention (each frame looks at itself only, in tuning
too), without inversion (from seeded noise), and without tuning. The metrics are the demo's own judge's, never CLIP's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tyro
from common import header, machine
from crossings import EDITS, Source, edit_config, scores, sources, tuned
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from tav_opt import command, editing, sheet, video
from tav_opt.demo import world
from tav_opt.demo.judge import Judge
from tav_opt.engines.pytorch import open_checkpoint

VARIANTS = ("full", "without sparse-causal attention", "without inversion", "without tuning")
UNTUNED = {"steps": 1, "lr": 0.0}
METRICS = ("frame consistency", "textual alignment", "track", "flicker")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Edits of the package's clips by each variant."""

    edits: int = 3
    """Of each clip: a subject, a place, a style."""
    folder: Path = Path("demo-out/ablation")
    """Tuned clips, sheets and GIFs."""
    out: Path = Path("benchmarks/results/ablation.json")


def main(config: Ablation) -> int:
    """Prints the table, and keeps it with a sheet and a GIF of each clip."""
    config.folder.mkdir(parents=True, exist_ok=True)
    judge, found = Judge.open(), {variant: list[dict[str, float]]() for variant in VARIANTS}
    for source in sources():
        changes = EDITS[source.name][: 2 * config.edits : 2]  # a subject, a place, a style
        made = {variant: _edits(source, variant, changes, config.folder) for variant in VARIANTS}
        for variant, clips in made.items():
            found[variant] += [scores(judge, f, source, change) for f, change in zip(clips, changes, strict=True)]
        _show(source, {variant: clips[0] for variant, clips in made.items()}, changes[0], config.folder)
    rows = {
        variant: {name: float(np.mean([score[name] for score in of])) for name in METRICS}
        for variant, of in found.items()
    }
    print(header(f"ablation: {len(found['full'])} edits a variant, means"))
    print(f"\n| variant | {' | '.join(METRICS)} |\n|---|{'---:|' * len(METRICS)}")
    for variant, row in rows.items():
        print(f"| {variant} | {' | '.join(f'{value:.3f}' for value in row.values())} |")
    content = {"command": " ".join(sys.argv), "machine": machine(), "means": rows, "edits": found}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def _edits(source: Source, variant: str, changes: Sequence[dict[str, str]], folder: Path) -> list[np.ndarray]:
    """The clip tuned and edited by a variant: uint8 (f, H, W, 3) a change."""
    alone, untrained = variant == "without sparse-causal attention", variant == "without tuning"
    name = f"{source.name}-alone" if alone else f"{source.name}-untuned" if untrained else source.name
    with patch("tav_opt.attention.sparse_causal_attention", each_frame_alone) if alone else nullcontext():
        engine = open_checkpoint(tuned(source, folder / name, **(UNTUNED if untrained else {})))
        configs = [edit_config(source.edited(change), inversion=variant != "without inversion") for change in changes]
        return [editing.edit(engine, c)[0] for c in tqdm(configs, desc=f"{source.name} {variant}", disable=None)]


def each_frame_alone(q: Tensor, k: Tensor, v: Tensor, _frames: int, heads: int) -> Tensor:
    """The image model's own self-attention in the place of equation 4; q, k, v (b f) n c → (b f) n c."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _show(source: Source, made: dict[str, np.ndarray], change: dict[str, str], folder: Path) -> None:
    clips, captions = [source.clip.frames, *made.values()], [source.caption, *made]
    captions[1] = f"full: {world.prompt(source.edited(change))}"
    Image.fromarray(sheet.contact_sheet(clips, captions)).save(folder / f"{source.name}.png")
    video.write(folder / f"{source.name}.gif", sheet.side_by_side(clips, captions), source.clip.fps)


if __name__ == "__main__":
    settings = tyro.cli(Ablation)
    sys.exit(command.run("ablation", lambda: main(settings)))
