"""What each part of the method does: `python benchmarks/ablation.py --help` (paper section 4.4, figure 8).

The package's clips are edited in full, without sparse-causal attention (each frame looks at itself only, in tuning
too), without inversion (from seeded noise), without both, and without tuning. The metrics are the demo's own judge's,
never CLIP's.

Prompts are of two kinds. In the demo's world a complete caption leaves one appearance (a tiger is one picture), so
its frames agree without looking at each other; an open one leaves the place to the frames.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tyro
from common import header, machine
from crossings import EDITS, Source, edit_config, metrics, sources, tuned
from PIL import Image
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from tav_opt import command, editing, sheet, video
from tav_opt.demo import world
from tav_opt.demo.judge import Judge
from tav_opt.engines.pytorch import open_checkpoint

ATTENTION, INVERSION, TUNING = "sparse-causal attention", "inversion", "tuning"
VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    f"without {ATTENTION}": (ATTENTION,),
    f"without {INVERSION}": (INVERSION,),
    f"without {INVERSION} and {ATTENTION}": (INVERSION, ATTENTION),
    f"without {TUNING}": (TUNING,),
}
"""What each variant lacks. Inverted latents tie the frames too: only without them is the attention alone to do it."""


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
        for kind, prompts in {"complete": complete(source), "open": left_open(source)}.items():
            made = {variant: _edits(source, variant, prompts, config.folder) for variant in VARIANTS}
            for variant, clips in made.items():
                judged = [metrics(judge, frames, source, prompt) for frames, prompt in zip(clips, prompts, strict=True)]
                found.setdefault(kind, {}).setdefault(variant, []).extend(judged)
            for index, prompt in enumerate(prompts):
                shown = {variant: clips[index] for variant, clips in made.items()}
                _show(source, shown, prompt, config.folder / f"{source.name}-{kind}-{index}")
    means = {kind: {variant: _mean(of) for variant, of in variants.items()} for kind, variants in found.items()}
    for kind, rows in means.items():
        _print(f"ablation: {len(found[kind]['full'])} edits a variant, {kind} captions, means", rows)
    content = {"command": " ".join(sys.argv), "machine": machine(), "means": means, "edits": found}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(content, indent=2) + "\n")
    return 0


def complete(source: Source) -> list[str]:
    """Prompts that change the subject, the place and the style."""
    return [world.prompt(source.edited(change)) for change in EDITS[source.name][:6:2]]


def left_open(source: Source) -> list[str]:
    """Prompts that name a subject, the source's own and another, and leave the place open."""
    return [world.subject_phrase(name) for name in (source.scene.subject, EDITS[source.name][0]["subject"])]


def _edits(source: Source, variant: str, prompts: list[str], folder: Path) -> list[np.ndarray]:
    """The clip tuned and edited by a variant: uint8 (f, H, W, 3) a prompt."""
    lacks = VARIANTS[variant]
    suffix = "-alone" if ATTENTION in lacks else "-untuned" if TUNING in lacks else ""
    untrained = {"steps": 1, "lr": 0.0} if TUNING in lacks else {}
    with patch("tav_opt.attention.sparse_causal_attention", each_frame_alone) if ATTENTION in lacks else nullcontext():
        engine = open_checkpoint(tuned(source, folder / f"{source.name}{suffix}", **untrained))
        configs = [edit_config(prompt, inversion=INVERSION not in lacks) for prompt in prompts]
        return [editing.edit(engine, c)[0] for c in tqdm(configs, desc=f"{source.name} {variant}", disable=None)]


def each_frame_alone(q: Tensor, k: Tensor, v: Tensor, _frames: int, heads: int) -> Tensor:
    """The image model's own self-attention in the place of equation 4; q, k, v (b f) n c → (b f) n c."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _mean(judged: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([figures[name] for figures in judged])) for name in judged[0]}


def _print(title: str, rows: dict[str, dict[str, float]]) -> None:
    names = next(iter(rows.values()))
    print(header(title))
    print(f"\n| variant | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for variant, row in rows.items():
        print(f"| {variant} | {' | '.join(f'{value:.3f}' for value in row.values())} |")


def _show(source: Source, made: dict[str, np.ndarray], prompt: str, file: Path) -> None:
    clips, captions = [source.clip.frames, *made.values()], [source.caption, *made]
    captions[1] = f"full: {prompt}"
    Image.fromarray(sheet.contact_sheet(clips, captions)).save(file.with_suffix(".png"))
    video.write(file.with_suffix(".gif"), sheet.side_by_side(clips, captions), source.clip.fps)


if __name__ == "__main__":
    settings = tyro.cli(Ablation)
    sys.exit(command.run("ablation", lambda: main(settings)))
