"""A small suite over the four real clips, on the reference's small model and the demo's encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tav_opt import cli, video
from tav_opt.metrics.clip_encoder import DEMO

PLACE = {"device": "cpu", "dtype": "float32"}
FRAMES, SIDE = 3, 64
CLIPS = {
    "car-turn": ("a car", 2),
    "man-skiing": ("a man is skiing", 2),
    "man-surfing": ("a man", 1),
    "rabbit-watermelon": ("a rabbit", 2),
}
"""Captions, which the small model's tokenizer spells letter by letter, and the reference's strides (shared/clips)."""


def settings(model: Path | str, **more: Any) -> dict[str, Any]:
    """A suite's keys without its videos."""
    return {
        "model": str(model),
        "clip": {"frames": FRAMES, "height": SIDE, "width": SIDE},
        "tune": {"steps": 2, "inversion_steps": 2, "save_every": 1},
        "edit": {"steps": 2},
        "metrics": {"clip": str(DEMO)},
    } | more


def written(folder: Path, content: dict[str, Any] | str, name: str = "suite.yaml") -> Path:
    """A suite's file."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def random_video(path: Path, frames: int = 8, seed: int = 0) -> Path:
    """A video of noise."""
    video.write(path, np.random.default_rng(seed).integers(0, 256, (frames, 64, 64, 3), dtype=np.uint8), 8)
    return path


def entry(path: Path | str, **more: Any) -> dict[str, Any]:
    """A video with one edit."""
    return {"video": str(path), "caption": "a dog", "edits": [{"prompt": "a cat", "category": "subject"}]} | more


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Status, stdout and stderr of `tav-opt evaluate`."""
    capsys.readouterr()
    status = cli.main(["evaluate", *map(str, arguments)])
    return status, *capsys.readouterr()


def ended(error: str) -> list[str]:
    """The kinds and names of the units that a run did."""
    return [line.split("] ")[1].split(":")[0] for line in error.splitlines() if line.startswith("[")]
