"""What a mask keeps: an edit of the subject inside a square about it, against the source and its reconstruction.

`python benchmarks/masks.py` on what `benchmarks/long_clips.py` made: the first 24 frames of its clip, by its graphs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from common import header, machine
from long_clips import NAME, LongClips, source

from tav_opt import command, editing, video
from tav_opt.demo.clips import FRAMES
from tav_opt.demo.run import DemoConfig
from tav_opt.engines.registry import open_clip
from tav_opt.export.whole_edit import psnr
from tav_opt.files import write_json
from tav_opt.video import contact_sheet

HALF = 24
"""Of the square's side in pixels."""


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Edit a clip with and without a mask about its subject, and print the PSNR outside of it."""

    prompt: str = "a tiger on the beach"
    steps: int = 20
    folder: Path = Path("long-clips")
    out: Path = Path("benchmarks/results/masks.json")


def main(config: Masks) -> int:
    """Writes the figures and a sheet."""
    frames, track = (x[:FRAMES] for x in source(LongClips()))
    engine = open_clip(config.folder / "repository", NAME)
    edit = replace(DemoConfig(ddim_steps=config.steps).edit_config(config.prompt), prompts=(config.prompt,))
    mask = about(track, frames.shape[1:3])
    found = {
        "free": editing.edit(engine, edit, frames=frames)[0],
        "masked": editing.edit(engine, edit, frames=frames, mask=mask)[0],
        "reconstruction": engine.decode(engine.encode_video(frames))[0],
    }
    rows = {
        f"{name} against {other}, {where}": psnr(
            found[name][part], (frames if other == "source" else found[other])[part]
        )
        for name in ("free", "masked")
        for other in ("source", "reconstruction")
        for where, part in (("outside", ~mask), ("inside", mask))
    }
    print(rows)
    shown = [frames, np.repeat(mask[..., None] * np.uint8(255), 3, -1), found["free"], found["masked"]]
    sheet = contact_sheet.contact_sheet(shown, ["source", "mask", f"{config.prompt}", f"{config.prompt}, masked"])
    video.write_png(config.folder / "masks.png", sheet)
    print(header("masks"))
    write_json(config.out, {"machine": machine(), "frames": FRAMES, "steps": config.steps, "dB": rows})
    return 0


def about(track: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A square about each middle (f, 2), x and y: bool (f, H, W)."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.maximum(abs(x - track[:, 0, None, None]), abs(y - track[:, 1, None, None])) <= HALF


if __name__ == "__main__":
    sys.exit(command.run("benchmarks/masks.py", lambda arguments: main(tyro.cli(Masks, args=arguments))))
