"""Edits at the source's size and aspect: what was cropped is black, the rest is where it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exported import FRAMES, SIDE

from tav_opt import cli, tuning, video
from tav_opt.config import TrainConfig
from tav_opt.video.restoring import Shape, restored


def smooth(height: int, width: int, count: int = 2) -> np.ndarray:
    """Colours that rise from left to right and from top to bottom."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], -1)
    return np.repeat(np.rint(picture).astype(np.uint8)[None], count, 0)


@pytest.mark.parametrize(("height", "width"), [(120, 200), (200, 120), (64, 64), (90, 161)])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_what_was_fitted_comes_back_where_it_was(tmp_path: Path, height, width, fit):
    frames = smooth(height, width)
    video.write(tmp_path / "source", frames, 8)
    clip = video.read(tmp_path / "source", height=64, width=64, fit=fit)
    assert clip.shape == Shape(height=height, width=width, fit=fit)
    found = restored(clip.frames, clip.shape)
    assert found.shape == frames.shape
    left, top, right, bottom = map(round, clip.shape.taken(64, 64))
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    assert not found[:, ~inside].any(), "black where nothing is known"
    assert inside.all() == (fit == "squash" or height == width)
    inner = (slice(None), slice(top + 6, bottom - 6), slice(left + 6, right - 6))
    assert np.abs(found[inner].astype(int) - frames[inner]).max() <= 4


def test_the_command_writes_at_the_sources_size(golden: Path, tmp_path: Path, capsys):
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, 96, 160, 3), dtype=np.uint8)
    video.write(tmp_path / "source", frames, 8)
    base, config = golden / "reference_checkpoint" / "sd", TrainConfig(steps=1, inversion_steps=1)
    clip = video.read(tmp_path / "source", height=SIDE, width=SIDE)
    tuning.tune(base, clip, "x", config, tmp_path / "ckpt")
    edit = f"edit {tmp_path / 'ckpt'} --prompt x --steps 1 --out".split()
    for size, shape in (("clip", (SIDE, SIDE)), ("source", (96, 160))):
        assert cli.main([*edit, str(tmp_path / f"as-{size}"), "--size", size]) == 0
        found = video.read(tmp_path / f"as-{size}").frames
        assert found.shape == (FRAMES, *shape, 3)
    assert not found[:, :, :32].any() and not found[:, :, 128:].any() and found[:, :, 32:128].any()
    tuning.tune(base, video.Clip(frames=clip.frames, fps=8), "x", config, tmp_path / "sizeless")
    capsys.readouterr()
    assert cli.main(["edit", str(tmp_path / "sizeless"), "--prompt", "x", "--size", "source"]) == 2
    assert "does not tell its source's size" in capsys.readouterr().err
