"""What a mask keeps: the blend by hand, and edits that change nothing outside of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tav_opt import blending, ddim, video
from tav_opt.blending import Blend, feathered
from tav_opt.config import ClipConfig, InputError
from tav_opt.solvers import solver
from tav_opt.video import masks

SCHEDULE = ddim.Schedule.from_config(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False}
)


def left_half(frames: int = 3, side: int = 64) -> np.ndarray:
    mask = np.zeros((frames, side, side), bool)
    mask[:, :, : side // 2] = True
    return mask


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_mask_goes_over_in_one_latent_to_either_side():
    share = feathered(left_half(), random(1, 4, 3, 8, 8))
    assert share.shape == (1, 1, 3, 8, 8)
    assert torch.equal(share[0, 0, 1, 3], torch.tensor([1, 1, 1, 0.75, 0.25, 0, 0, 0]))


def test_half_covered_latents_are_half_and_white_and_black_stay():
    mask = np.zeros((1, 16, 16), bool)
    mask[:, :, :12] = True  # the right column of latents by half
    assert feathered(mask, random(1, 4, 5, 2, 2))[0, 0, 0, 0].tolist() == [0.875, 0.625]
    assert (feathered(np.ones((1, 16, 16), bool), random(1, 4, 5, 2, 2)) == 1).all()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((3, 64, 64), bool), "black all over"),
        (np.ones((2, 64, 64), bool), r"\(2, 64, 64\): must be bool \(1 or 3, H, W\)"),
        (np.ones((3, 64, 64), np.uint8), "mask uint8"),
        (np.ones((3, 64, 32), bool), "height and width"),
    ],
)
def test_other_masks_are_refused(mask, words):
    with pytest.raises(InputError, match=words):
        feathered(mask, random(1, 4, 3, 8, 8))


@pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_outside_the_mask_the_source_comes_out_bit_for_bit(name, eta):
    if eta and name != "ddim":
        return
    source, start, text = random(1, 4, 3, 8, 8), random(1, 4, 3, 8, 8, seed=1), torch.zeros(1, 1, 1)
    alpha = SCHEDULE.alpha(SCHEDULE.timesteps(6)[0])
    blend, seen = Blend.of(left_half(), source, start, alpha), []
    found = ddim.sample(
        lambda x, *_: 0.5 * x + 0.3,
        start.expand(2, -1, -1, -1, -1),
        text.expand(2, -1, -1),
        SCHEDULE,
        6,
        solver=solver(name, 6),
        eta=eta,
        generator=torch.Generator().manual_seed(0),
        blend=blend,
        on_step=seen.append,
    )
    assert torch.equal(found[..., 5:], source[..., 5:].expand(2, -1, -1, -1, -1))
    assert (found[..., :3] - source[..., :3]).abs().mean() > 0.1, "nothing was edited"
    for step in seen:
        assert torch.equal(step.clean[..., 5:], source[..., 5:].expand(2, -1, -1, -1, -1))


def test_the_kept_source_is_on_the_line_to_where_sampling_starts():
    source, start = random(1, 4, 3, 8, 8), random(1, 4, 3, 8, 8, seed=1)
    blend = Blend.of(left_half(), source, start, 0.01)
    assert torch.allclose(blend(torch.zeros_like(start), 0.01)[..., 5:], start[..., 5:], atol=1e-6)
    noise = (start - 0.1 * source) / np.sqrt(0.99)
    middle = np.sqrt(0.5) * (source + noise)
    assert torch.allclose(blend(torch.zeros_like(start), 0.5)[..., 5:], middle[..., 5:], atol=1e-6)


def test_a_white_mask_is_no_mask():
    source, start, text = random(1, 4, 3, 8, 8), random(1, 4, 3, 8, 8, seed=1), torch.zeros(1, 1, 1)
    blend = Blend.of(np.ones((1, 64, 64), bool), source, start, SCHEDULE.alpha(SCHEDULE.timesteps(4)[0]))

    def sampled(blend: ddim.Blend | None) -> torch.Tensor:
        return ddim.sample(lambda x, *_: x.sin(), start, text, SCHEDULE, 4, blend=blend)

    assert torch.equal(sampled(blend), sampled(None))


# From files.


def shown(mask: np.ndarray) -> np.ndarray:
    return np.repeat(mask[..., None] * np.uint8(255), 3, -1)


def test_masks_of_files_are_fitted_like_the_source(tmp_path: Path):
    mask = np.zeros((7, 64, 96), bool)
    for number, frame in enumerate(mask):
        frame[:, 16 + 8 * number : 32 + 8 * number] = True
    (tmp_path / "mask.mkv").write_bytes(masks.encoded(mask))
    video.write(tmp_path / "folder", shown(mask), 8)
    Image.fromarray(shown(mask)[0]).save(tmp_path / "mask.png")
    source = ClipConfig(video=tmp_path / "other.mp4", start=1, stride=2, frames=3, height=32, width=32)
    expected = video.read(replace(source, video=tmp_path / "folder")).frames.max(-1) >= 128
    for name in ("mask.mkv", "folder"):
        assert np.array_equal(masks.of_edit(tmp_path / name, source, 3, 32, 32), expected)
        assert np.array_equal(masks.of_edit(tmp_path / name, None, 7, 64, 96), mask)
        assert np.array_equal(masks.of_edit(tmp_path / name, source, 7, 64, 96), mask), "each of its own"
        with pytest.raises(InputError, match="has 7 frames: must have 1, or 3 as the edit has"):
            masks.of_edit(tmp_path / name, None, 3, 32, 32)
    one = masks.of_edit(tmp_path / "mask.png", source, 3, 64, 96)
    assert one.shape == (1, 64, 96) and np.array_equal(one[0], mask[0])


def test_a_mask_survives_its_file():
    mask = np.random.default_rng(0).random((3, 16, 24)) > 0.5
    assert np.array_equal(masks.of_frames(video.decode(masks.encoded(mask)).frames), mask)


def test_the_feather_is_as_wide_as_it_says():
    assert blending.FEATHER.sum() == 1 and len(blending.FEATHER) == 3
