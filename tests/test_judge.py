"""The metrics on clips whose answer is known, and the judge's two networks after a little training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tav_opt.config import InputError
from tav_opt.demo import subjects, world
from tav_opt.demo.judge import Judge, frame_difference, outside, track_correlation
from tav_opt.demo.locator import Locator, LocatorStage
from tav_opt.demo.training import to_unit

SHAPES = subjects.shapes()


def test_the_locator_learns_where_the_subject_is() -> None:
    torch.manual_seed(0)
    stage = LocatorStage(SHAPES, test=24)
    optimizer, pixels = torch.optim.AdamW(stage.locator.parameters(), lr=5e-3), to_unit(stage.test)
    before = stage.error()
    for _ in range(60):
        optimizer.zero_grad()
        (stage.locator(pixels) - stage.middles).norm(dim=1).mean().backward()
        optimizer.step()
    assert stage.error() < 0.5 * before


def test_the_map_is_in_pixels() -> None:
    locator = Locator()
    torch.nn.init.zeros_(locator.layers[-1].weight)
    middle = locator(to_unit(np.zeros((1, 64, 64, 3), np.uint8)))
    assert middle.tolist() == [[pytest.approx(31.5), pytest.approx(31.5)]]


def test_composed_pictures_know_their_middle() -> None:
    for seed in range(5):
        scene = world.Scene(subject="red circle", place="white")
        picture, (x, y) = world.compose_at(scene, SHAPES, np.random.default_rng(seed))
        red = np.argwhere((picture[..., 0] > 150) & (picture[..., 1] < 90))
        inside = world.SIZE * world.SCALES[1] / 2 < x < world.SIZE * (1 - world.SCALES[1] / 2)
        assert not inside or abs(red[:, 1].mean() - x) < 2
        assert abs(red[:, 0].max() + red[:, 0].min() - 2 * y) < 6


def test_tracks() -> None:
    way = np.stack([np.linspace(20, 44, 24), 3 * np.sin(np.arange(24))], 1)
    assert track_correlation(way + 7, way) == pytest.approx(1)
    assert track_correlation(way * [-1, -1], way) == pytest.approx(-1)
    assert abs(track_correlation(np.random.default_rng(0).normal(size=(24, 2)), way)) < 0.5
    assert track_correlation(np.ones((24, 2)), way) == 0


def test_differences_outside_the_subject() -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    frames[1, 2:5, 2:5] = 30
    where = outside(np.full((3, 2), 3.0), 4, (8, 8))
    assert frame_difference(frames) == pytest.approx(30 * 9 / 64)
    assert not frame_difference(frames, where) and where.sum() == 2 * (64 - 25)


def test_a_judge_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="clip_model does not exist"):
        Judge.open(tmp_path)
