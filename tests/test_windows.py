"""Clips longer than a window: what covers them, with which weights, against loops by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tav_opt import ddim, inversion, windows
from tav_opt.conditions.condition import DOWN, INSIDE, MID
from tav_opt.config import InputError, InversionConfig

SCHEDULE = ddim.Schedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
LENGTHS = [(9, 8), (17, 8), (96, 24), (500, 24), (25, 24), (5, 2), (7, 3), (47, 24), (48, 24)]


def latents_of(frames: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 4, frames, 3, 2, generator=torch.Generator().manual_seed(seed))


def own_frames(begin: int, window: int) -> list[int]:
    """Of the clip, as a window has them: frame 0 first."""
    return [0, *range(begin + 1, begin + window)]


@pytest.mark.parametrize(("total", "window"), LENGTHS)
def test_every_frame_is_covered_and_neighbours_share_a_quarter(total, window):
    begins = windows.begins(total, window)
    assert begins[0] == 0 and begins[-1] == total - window and begins == sorted(set(begins))
    assert {frame for begin in begins for frame in own_frames(begin, window)} == set(range(total))
    for one, other in itertools.pairwise(begins):
        shared = len(set(own_frames(one, window)[1:]) & set(own_frames(other, window)[1:]))
        assert shared >= min(round(window / 4), window - 2)


def test_no_more_windows_than_the_overlap_asks_for():
    assert windows.begins(24, 24) == [0]
    assert len(windows.begins(24 + 17, 24)) == 2 and len(windows.begins(24 + 18, 24)) == 3
    assert len(windows.begins(96, 24)) == 6


@pytest.mark.parametrize(("total", "window"), LENGTHS)
def test_the_weights_of_each_frame_sum_to_one_and_ramp(total, window):
    found = windows.weights(total, window)
    sums = np.zeros(total)
    for begin, row in zip(windows.begins(total, window), found.numpy(), strict=True):
        np.add.at(sums, own_frames(begin, window), row)
    assert np.allclose(sums, 1, atol=1e-12)
    assert found[0, 0] == 1 and (found[1:, 0] == 0).all(), "frame 0 is the first window's own"
    assert (found[:, 1:] > 0).all()
    if total == 2 * window - 1 - window // 4:  # one seam: straight up, from one to the other
        shared = found[1, 1 : 1 + window // 4]
        assert torch.allclose(shared.diff(), shared.diff()[:1].expand(len(shared) - 1))


def by_hand(predict, latents: torch.Tensor, window: int) -> torch.Tensor:
    """Frame by frame, in float64: of each window that has the frame, by a triangle's height there."""
    begins = windows.begins(latents.shape[2], window)
    found = []
    for frame in range(latents.shape[2]):
        total, weight = torch.zeros(latents[:, :, 0].shape, dtype=torch.float64), 0.0
        for begin in begins:
            place = frame - begin
            if not 1 <= place < window or frame == 0:
                continue
            answer = predict(latents[:, :, own_frames(begin, window)])[:, :, place]
            height = min(place, window - place)
            total, weight = total + height * answer.double(), weight + height
        first = predict(latents[:, :, :window])[:, :, 0].double()
        found.append(first if frame == 0 else total / weight)
    return torch.stack(found, 2)


def mixing(latents: torch.Tensor) -> torch.Tensor:
    """No linear function of one frame: each sees the window's first, the one before, and all of them."""
    before = torch.cat([latents[:, :, :1], latents[:, :, :-1]], 2)
    return torch.tanh(latents + 0.5 * latents[:, :, :1] - 0.3 * before + latents.mean(2, keepdim=True))


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
@pytest.mark.parametrize(("total", "window"), [(17, 8), (30, 8), (9, 8), (7, 3)])
def test_it_is_the_loop_by_hand(total, window, at_once):
    calls = []

    def predict(latents, timestep, text):
        calls.append(latents.shape)
        return mixing(latents) + text[:, :1, :1, None, None]

    latents, text = latents_of(total, rows=2), torch.tensor([1.0, -1.0])[:, None, None]
    found = windows.windowed(predict, window, at_once=at_once)(latents, 7, text)
    expected = by_hand(mixing, latents, window) + text[:, :1, :1, None, None]
    assert torch.allclose(found.double(), expected, atol=1e-6)
    count = len(windows.begins(total, window))
    assert sum(shape[0] for shape in calls) == 2 * count and len(calls) == -(-count // at_once)
    assert {tuple(shape[1:]) for shape in calls} == {(4, window, 3, 2)}


def test_a_prediction_that_knows_no_neighbours_is_as_without_windows():
    latents = latents_of(50)
    whole = windows.windowed(lambda x, _t, _text: x.sin(), 8)(latents, 0, torch.zeros(1, 1, 1))
    assert torch.allclose(whole, latents.sin(), atol=1e-6)


def test_as_many_frames_as_a_window_has_go_through_untouched():
    given = []

    def predict(*arguments):
        given.extend(arguments)
        return arguments[0]

    latents, text, timestep = latents_of(8), torch.zeros(1, 2, 3), torch.tensor(3)
    assert windows.windowed(predict, 8, at_once=4)(latents, timestep, text) is latents
    assert all(one is other for one, other in zip(given, (latents, timestep, text), strict=True))


def test_fewer_frames_are_refused_with_their_number():
    with pytest.raises(InputError, match="7 frames, but the network takes 8 at once: give 8 or more"):
        windows.windowed(lambda x, *_: x, 8)(latents_of(7), 0, torch.zeros(1, 1, 1))


def test_a_mapping_is_cut_where_it_has_frames_and_rows_keep_their_timesteps():
    seen = []

    def predict(latents, timestep, text):
        seen.append((latents, timestep, text))
        return latents

    latents = latents_of(12, rows=2)
    told = {"text": torch.randn(2, 5, 3), "edges": latents * 2, "scale": torch.tensor([1.0, 2.0])}
    windows.windowed(predict, 8, at_once=2)(latents, torch.tensor([3, 4]), told)
    rows, timestep, text = seen[0]
    assert torch.equal(text["edges"], rows * 2)
    assert timestep.tolist() == [3, 4, 3, 4] and text["scale"].tolist() == [1, 2, 1, 2]
    assert torch.equal(text["text"], torch.cat([told["text"]] * 2))


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_conditions_add_is_cut_by_its_frames_whatever_its_width(at_once):
    seen = []

    def predict(latents, _timestep, text):
        seen.append((latents, text))
        return latents

    latents, total, window = latents_of(12, rows=2), 12, 8
    told = {f"{DOWN}.1": (latents * 2).transpose(1, 2), MID: torch.randn(2, total, total, 1, 1)}
    told |= {f"{INSIDE}.0": torch.randn(2, total, window, 3, 2), "text": torch.randn(2, 5, 3)}
    windows.windowed(predict, window, at_once=at_once)(latents, 3, told)
    assert all(torch.equal(text[f"{DOWN}.1"], (rows * 2).transpose(1, 2)) for rows, text in seen)
    own = [own_frames(begin, window) for begin in windows.begins(total, window)]
    for name in (MID, f"{INSIDE}.0"):
        assert torch.equal(torch.cat([text[name] for _, text in seen]), torch.cat([told[name][:, x] for x in own]))


def test_inversion_and_sampling_go_through_windows():
    """A prediction of one frame alone comes to the same with and without windows, through the whole loop."""

    def predict(latents, timestep, text):
        return 0.3 * latents + 0.01 * float(timestep) / 1000

    latents, text = latents_of(20), torch.zeros(1, 1, 1)
    over = windows.windowed(predict, 8)
    config = InversionConfig(steps=5, iterations=2)
    inverted = inversion.invert(over, latents, text, SCHEDULE, config)
    assert torch.allclose(inverted, inversion.invert(predict, latents, text, SCHEDULE, config), atol=1e-5)
    sampled = ddim.sample(over, inverted, text, SCHEDULE, 5, unconditional=text, guidance_scale=7.5)
    assert (sampled - latents).abs().max() < 0.05
