"""The edit against the reference, end to end, and its refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tav_opt import ddim, editing, models
from tav_opt.config import EditConfig, InputError
from tav_opt.contract import ClipInfo
from tav_opt.engines.pytorch import TorchEngine
from tav_opt.video.pixels import to_frames


@pytest.fixture(scope="module")
def expected(golden):
    return load_file(golden / "reference_checkpoint" / "end_to_end.safetensors")


@pytest.fixture(scope="module")
def engine(golden, expected):
    sd = models.load(golden / "reference_checkpoint" / "tuned")
    pixels = expected["source_video_unit_range"][0] * 2 - 1
    source = (sd.vae.encode(pixels).latent_dist.mean * sd.vae.config.scaling_factor).transpose(0, 1)[None]
    info = ClipInfo(
        base="tuned", base_hash="", prompt="a man is skiing", frames=5, height=64, width=64, fps=8, inversion_steps=4
    )
    return TorchEngine(sd=sd, info=info, source_latents=source, inverted_latents=torch.zeros_like(source))


CONFIG = EditConfig(prompts=("a panda is skiing",), steps=8, inversion_steps=8, guidance_scale=7.5)


def test_edit_equals_the_reference_end_to_end(engine, expected, monkeypatch):
    floats = []
    monkeypatch.setattr(models, "to_frames", lambda pixels: floats.append(pixels) or to_frames(pixels))
    editing.edit(engine, CONFIG)
    found = (torch.cat(floats) / 2 + 0.5).clamp(0, 1).transpose(0, 1)[None]
    error = (found - expected["edited_video_unit_range"]).abs().max().item()
    assert error < 2e-4, f"largest error {error:.1e} of 0…1"


def test_own_source_is_inverted_only_for_other_steps(engine):
    kept = editing.start_latents(engine, EditConfig(prompts=("x",), inversion_steps=4))
    assert kept is engine.inverted_latents
    assert editing.start_latents(engine, EditConfig(prompts=("x",), inversion_steps=2)).abs().max() > 0


def test_several_prompts_equal_one_at_a_time_and_progress_is_whole(engine):
    seen = []
    config = EditConfig(prompts=("a panda", "a man"), steps=2, inversion_steps=4, eta=0.5)
    both = editing.edit(engine, config, on_progress=lambda *a: seen.append(a))
    one = editing.edit(engine, EditConfig(prompts=("a man",), steps=2, inversion_steps=4, eta=0.5))
    assert both.shape == (2, 5, 64, 64, 3) and abs(both[1:].astype(int) - one).max() <= 1
    assert seen == [("sample", n, 4) for n in (1, 2, 3, 4)]


def test_seeded_noise_without_inversion(engine):
    def edit(seed: int) -> np.ndarray:
        return editing.edit(engine, EditConfig(prompts=("a man",), steps=1, inversion=False, seed=seed))

    assert np.array_equal(edit(1), edit(1)) and not np.array_equal(edit(1), edit(2))


def test_stops_between_steps(engine):
    seen = []

    def leave(*step: object) -> None:
        seen.append(step)
        if len(seen) == 3:
            raise ddim.Stopped

    with pytest.raises(ddim.Stopped):
        editing.edit(engine, CONFIG, on_progress=leave)
    assert seen == [("invert", step, 8) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"prompts": ()}, "no prompt"),
        ({"prompts": (" ",)}, "empty"),
        ({"steps": 0}, "steps 0"),
        ({"guidance_scale": math.nan}, "nan"),
        ({"guidance_scale": 1e9}, "guidance"),
        ({"eta": -0.1}, "eta"),
        ({"seed": -1}, "seed"),
        ({"inversion_steps": 1001}, "1001"),
    ],
)
def test_impossible_settings_are_named(settings, word):
    with pytest.raises(InputError, match=word):
        editing.check(EditConfig(**{"prompts": ("a man",), **settings}))
