"""Tracks and differences whose answer is known, and the judge's two networks after a little training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tav_opt
from tav_opt import video
from tav_opt.config import InputError
from tav_opt.demo import subjects, world
from tav_opt.demo.dual_encoder import phrase_of
from tav_opt.demo.emoji import JUDGED
from tav_opt.demo.judge import Judge, frame_difference, outside, track_correlation
from tav_opt.demo.locator import Locator, LocatorStage
from tav_opt.demo.places import PLACES
from tav_opt.demo.training import to_unit
from tav_opt.files import read_json
from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.metrics.clip_scores import textual_alignment
from tav_opt.suite.each_frame import each_frame_alone

SHAPES = subjects.shapes()
PACKAGE = Path(tav_opt.__file__).parent / "demo"


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


def test_the_middle_is_of_what_is_visible() -> None:
    sprite = Image.new("RGBA", (40, 40))
    sprite.paste((255, 0, 0, 255), (0, 30, 40, 40))  # flat, at the foot of its square
    scene = world.Scene(subject="plank", place="white")
    for seed in range(5):
        picture, (_, y) = world.compose_at(scene, {"plank": [sprite]}, np.random.default_rng(seed))
        rows = np.argwhere((picture[..., 0] > 150) & (picture[..., 1] < 90))[:, 0]
        assert abs(rows.mean() - y) < 2


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


def test_without_sparse_causal_attention_each_frame_is_alone() -> None:
    """The ablation's stand-in is what equation 4 is for a clip of one frame, whose first and previous are itself."""
    q, k, v = torch.randn(3, 6, 16, 32).unbind()  # three frames of two clips
    alone = torch.cat([sparse_causal_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], 1, 4) for i in range(6)])
    torch.testing.assert_close(each_frame_alone(q, k, v, 3, 4), alone)
    assert not torch.allclose(sparse_causal_attention(q, k, v, 3, 4), alone)


def test_a_judge_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="clip_model does not exist"):
        Judge.open(tmp_path)


@pytest.fixture(scope="module")
def judge() -> Judge:
    try:
        return Judge.open()
    except InputError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("entry", read_json(PACKAGE / "clips" / "clips.json"), ids=lambda entry: entry["name"])
def test_the_packages_judge_knows_the_packages_clips(judge: Judge, entry: dict[str, Any]) -> None:
    frames = video.read(PACKAGE / "clips" / entry["file"], count=24, uniform=True, height=64, width=64).frames
    assert track_correlation(judge.track(frames), np.array(entry["track"])) > 0.9
    subject, place = (phrase_of(part, entry[part]) for part in ("subject", "place"))
    others = [phrase_of("subject", name) for name in JUDGED if name != entry["subject"]]
    assert (judge.classify(frames, [subject, *others]) == 0).mean() > 0.8
    elsewhere = [phrase_of("place", name) for name in PLACES if name != entry["place"]]
    assert (judge.classify(frames, [place, *elsewhere]) == 0).mean() > 0.8
    images, texts = judge.encoder.embed_images(frames), judge.encoder.embed_texts([entry["caption"], "a bus at night"])
    assert textual_alignment(images, texts[0]) > textual_alignment(images, texts[1])
