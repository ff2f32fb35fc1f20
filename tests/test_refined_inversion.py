"""Inversion with iterations: what diffusers' own DDIM makes of its steps, what comes back, and what it costs."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from exported import FRAMES, SIDE, tuned
from fakes import Stop
from test_schedules import SD, SPACINGS, START, TEXT, ZERO_SNR, smooth

from tav_opt import cli, ddim, editing, inversion, tuning, video
from tav_opt.config import EditConfig, InputError, InversionConfig, TrainConfig
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.models import load_video_unet

REFINED = InversionConfig(steps=20, iterations=5)


class Counted:
    """A network that counts how often it is asked."""

    def __init__(self, predict) -> None:
        self.predict, self.calls = predict, 0

    def __call__(self, *given):
        self.calls += 1
        return self.predict(*given)


def test_without_iterations_it_is_the_references_step_bit_for_bit():
    schedule = ddim.Schedule.from_config(SD)
    found = inversion.invert(smooth, START, TEXT, schedule, InversionConfig(steps=20))
    assert torch.equal(found, ddim.invert(smooth, START, TEXT, schedule, 20))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("process", [SD, SD | {"prediction_type": "v_prediction"}, ZERO_SNR], ids=["ε", "v", "zero"])
def test_every_step_is_undone_by_diffusers(process, spacing):
    config = process | {"timestep_spacing": spacing}
    scheduler, ends = DDIMScheduler(**config, clip_sample=False), [START]
    schedule = ddim.Schedule.from_config(config)
    inversion.invert(
        smooth, START, TEXT, schedule, replace(REFINED, iterations=20), on_step=lambda step: ends.append(step.latents)
    )
    scheduler.set_timesteps(REFINED.steps)
    for clean, noisy, t in zip(ends[:-1], ends[1:], scheduler.timesteps.tolist()[::-1], strict=True):
        found = scheduler.step(smooth(noisy, t, TEXT), t, noisy).prev_sample
        assert (found - clean).norm() < inversion.ENOUGH * clean.norm(), t


@pytest.fixture(scope="module")
def unet(golden):
    """Random, of Stable Diffusion 1.5's shape."""
    found = load_video_unet(golden / "unet_sd1" / "unet3d")
    schedule = ddim.Schedule.from_config(json.loads((golden / "unet_sd1" / "scheduler_config.json").read_text()))
    return (lambda x, t, text: found(x, ddim.timestep_rows(t, x), text)), schedule


def test_latents_come_back_within_a_hundredth(unet, tensors):
    source, text = tensors["ddim.latent0"], tensors["ddim.uncond"]
    schedule, errors = unet[1], []
    for config in (InversionConfig(steps=20), REFINED):
        predict = Counted(unet[0])
        noise = inversion.invert(predict, source, text, schedule, config)
        back = ddim.sample(unet[0], noise, text, schedule, config.steps)
        errors.append(float((back - source).norm() / source.norm()))
    assert errors[1] <= 0.01 and errors[1] < errors[0] / 4, errors
    assert predict.calls <= 2.25 * config.steps, predict.calls


@pytest.mark.parametrize("iterations", [0, 5])
@pytest.mark.parametrize("at", [0, 3, 15], ids=lambda at: f"call {at}")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_breaks_is_said(value, at, iterations):
    predict = Counted(lambda *given: smooth(*given) if predict.calls - 1 != at else torch.full_like(START, value))
    with pytest.raises(FloatingPointError, match="inversion: the network answers with NaN or infinity"):
        inversion.invert(predict, START, TEXT, ddim.Schedule.from_config(SD), replace(REFINED, iterations=iterations))


def test_nothing_stays_nothing():
    """Latents of zeros, of which a network that predicts zeros changes nothing."""
    found = inversion.invert(
        lambda x, *_: torch.zeros_like(x), torch.zeros_like(START), TEXT, ddim.Schedule.from_config(SD), REFINED
    )
    assert torch.equal(found, torch.zeros_like(START))


def engine_of(predict):
    return SimpleNamespace(predict=predict, info=SimpleNamespace(network_frames=START.shape[2]))


@pytest.mark.parametrize("iterations", [0, 5])
def test_it_can_be_stopped_before_every_call(iterations):
    config = replace(REFINED, iterations=iterations)
    predict, told, schedule = Counted(smooth), [], ddim.Schedule.from_config(SD)
    asked = editing.Calls(on_call=lambda: told.append(1)).predict(engine_of(predict))
    inversion.invert(asked, START, TEXT, schedule, config)
    assert len(told) == predict.calls
    predict = Counted(smooth)
    with pytest.raises(ddim.Stopped):
        asked = editing.Calls(on_call=Stop(3, ddim.Stopped())).predict(engine_of(predict))
        inversion.invert(asked, START, TEXT, schedule, config)
    assert predict.calls == 3


def test_a_step_that_has_no_inverse_is_refused():
    schedule = ddim.Schedule.from_config(ZERO_SNR | {"timestep_spacing": "trailing", "set_alpha_to_one": True})
    with pytest.raises(InputError, match="inversion steps 1: no picture tells"):
        inversion.invert(smooth, START, TEXT, schedule, InversionConfig(steps=1, iterations=1))


def test_what_a_step_tells_is_what_it_led_to():
    seen = []
    schedule = ddim.Schedule.from_config(SD)
    found = inversion.invert(smooth, START, TEXT, schedule, REFINED, on_step=seen.append)
    assert [(step.stage, step.number, step.total) for step in seen] == [("invert", n, 20) for n in range(1, 21)]
    assert torch.equal(seen[-1].latents, found)
    alpha = schedule.alpha(schedule.timesteps(20)[0])
    noise = (found - alpha**0.5 * seen[-1].clean) / (1 - alpha) ** 0.5
    assert torch.allclose(noise, smooth(found, schedule.timesteps(20)[0], TEXT), atol=0.02)


@pytest.fixture(scope="module")
def clip(golden, tmp_path_factory):
    """Tuned with an inversion of two iterations."""
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("refined") / "ckpt"
    config = TrainConfig(steps=1, inversion_steps=4, inversion_iterations=2)
    tuning.tune(golden / "reference_checkpoint" / "sd", video.Clip(frames=frames, fps=8), "a man", config, folder)
    return folder


def test_a_clip_keeps_the_inversion_that_it_was_tuned_with(clip):
    engine = open_checkpoint(clip)
    assert engine.info.inversion == InversionConfig(steps=4, iterations=2)
    own = editing.start_latents(engine, EditConfig(prompts=("x",)))
    assert own is engine.inverted_latents
    again = editing.start_latents(engine, EditConfig(prompts=("x",), inversion_steps=4, inversion_iterations=2))
    assert again is own
    plain = editing.start_latents(engine, EditConfig(prompts=("x",), inversion_iterations=0))
    other = editing.start_latents(engine, EditConfig(prompts=("x",), inversion_iterations=3, inversion_steps=5))
    assert not torch.equal(plain, own) and not torch.equal(other, own)
    assert torch.allclose(own, inversion.invert(
        engine.predict, engine.source_latents, engine.encode_text([""]), engine.schedule, engine.info.inversion
    ), atol=1e-3)  # fmt: skip


def test_the_command_edits_from_it_and_says_so(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for iterations in ("0", "2"):
        options = f"--prompt x --steps 2 --inversion-iterations {iterations} --device cpu --out {iterations}".split()
        assert cli.main(["edit", str(clip), *options]) == 0
    found = [video.read(tmp_path / name).frames.astype(int) for name in ("0", "2")]
    assert np.abs(found[0] - found[1]).max() > 0


def test_a_description_of_before_has_the_references_inversion(golden):
    made = tuned(golden / "reference_checkpoint" / "sd", np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8), seed=1)
    told = made.info.to_json()
    del told["inversion_iterations"]
    assert type(made.info).from_json(told).inversion == made.info.inversion == InversionConfig(steps=4)
