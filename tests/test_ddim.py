"""DDIM against the reference's trajectories and against diffusers, step by step."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from tav_opt import ddim
from tav_opt.config import InputError
from tav_opt.models import load_video_unet

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}


def smooth(latents: torch.Tensor, timestep: int, text: torch.Tensor) -> torch.Tensor:
    """A made-up network: depends on all it is given, and smoothly."""
    return torch.tanh(latents * 0.7 + timestep / 1000) * 0.5 + text.mean() * latents


@pytest.fixture(scope="module")
def reference(golden, tensors):
    unet = load_video_unet(golden / "unet_sd1" / "unet3d")
    schedule = ddim.Schedule.from_config(json.loads((golden / "unet_sd1" / "scheduler_config.json").read_text()))
    return (lambda x, t, text: unet(x, torch.full((len(x),), t), text)), schedule


def test_inversion_equals_the_reference_trajectory(reference, tensors):
    predict, schedule = reference
    steps = []
    ddim.invert(
        predict,
        tensors["ddim.latent0"],
        tensors["ddim.uncond"],
        schedule,
        10,
        on_step=lambda x: steps.append(x.latents),
    )
    for number, (ours, theirs) in enumerate(zip(steps, tensors["ddim.inversion_trajectory"][1:], strict=True)):
        assert (ours - theirs).abs().max() < 1e-5, f"step {number}"


def test_guided_sampling_equals_the_reference_trajectory(reference, tensors):
    predict, schedule = reference
    steps = []
    start = tensors["ddim.inversion_trajectory"][-1]
    uncond, cond = tensors["ddim.uncond"], tensors["ddim.cond"]
    ddim.sample(
        predict,
        start,
        cond,
        schedule,
        10,
        unconditional=uncond,
        guidance_scale=12.5,
        on_step=lambda x: steps.append(x.latents),
    )
    assert schedule.timesteps(10) == tensors["ddim.timesteps"].tolist()
    for number, (ours, theirs) in enumerate(zip(steps, tensors["ddim.guided_sampling_trajectory"], strict=True)):
        assert (ours - theirs).abs().max() < 5e-4, f"step {number}"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [1, 7, 50, 333])
def test_sampling_equals_diffusers_step_by_step(prediction_type, offset, steps):
    config = {**SD, "prediction_type": prediction_type, "steps_offset": offset, "clip_sample": False}
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(steps)
    text = torch.full((1, 2, 3), 0.05)
    x = start = torch.randn(1, 4, 2, 3, 5, generator=torch.Generator().manual_seed(1))
    expected = []
    for t in theirs.timesteps.tolist():
        x = theirs.step(smooth(x, t, text), t, x).prev_sample
        expected.append(x)
    found = []
    on_step = lambda x: found.append(x.latents)  # noqa: E731
    ddim.sample(smooth, start, text, ddim.Schedule.from_config(config), steps, on_step=on_step)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), f"step {number} of {steps}: {(a - b).abs().max():.1e}"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_equals_diffusers_inverse_scheduler(prediction_type):
    config = {**SD, "prediction_type": prediction_type, "clip_sample": False, "steps_offset": 0}
    theirs = DDIMInverseScheduler(**config, timestep_spacing="leading")
    theirs.set_timesteps(20)
    text = torch.zeros(1, 2, 3)
    x = start = torch.randn(1, 4, 2, 3, 5, generator=torch.Generator().manual_seed(2))
    for t in theirs.timesteps.tolist():
        x = theirs.step(smooth(x, t, text), t, x).prev_sample
    found = ddim.invert(smooth, start, text, ddim.Schedule.from_config(config), 20)
    assert torch.allclose(found, x, rtol=1e-4, atol=1e-4), (found - x).abs().max()


def test_eta_equals_diffusers_with_the_same_noise():
    config = {**SD, "steps_offset": 1, "clip_sample": False}
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(9)
    text = torch.zeros(1, 2, 3)
    x = start = torch.randn(1, 4, 2, 3, 5, generator=torch.Generator().manual_seed(3))
    noise = torch.Generator().manual_seed(4)
    for t in theirs.timesteps.tolist():
        x = theirs.step(
            smooth(x, t, text), t, x, eta=0.6, variance_noise=torch.randn(x.shape, generator=noise)
        ).prev_sample
    generator = torch.Generator().manual_seed(4)
    found = ddim.sample(smooth, start, text, ddim.Schedule.from_config(config), 9, eta=0.6, generator=generator)
    assert torch.allclose(found, x, rtol=1e-4, atol=1e-5)


def test_inversion_then_sampling_returns_and_more_steps_return_better():
    schedule = ddim.Schedule.from_config({**SD, "steps_offset": 1})
    start, text = torch.randn(1, 4, 2, 3, 5, generator=torch.Generator().manual_seed(5)), torch.zeros(1, 2, 3)
    errors = []
    for steps in (10, 50, 250):
        noise = ddim.invert(smooth, start, text, schedule, steps)
        errors.append((ddim.sample(smooth, noise, text, schedule, steps) - start).abs().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02, errors


def test_guidance_is_one_batched_call_and_equals_two():
    schedule = ddim.Schedule.from_config(SD)
    start = torch.randn(1, 4, 2, 3, 5)
    cond, uncond, batches = torch.full((1, 2, 3), 0.3), torch.zeros(1, 2, 3), []

    def predict(x: torch.Tensor, t: int, text: torch.Tensor) -> torch.Tensor:
        batches.append(len(x))
        return torch.stack([smooth(a, t, b) for a, b in zip(x, text, strict=True)])

    found = ddim.sample(predict, start, cond, schedule, 3, unconditional=uncond, guidance_scale=4.0)
    by_hand = ddim.sample(
        lambda x, t, _: smooth(x, t, uncond) + 4.0 * (smooth(x, t, cond) - smooth(x, t, uncond)),
        start,
        cond,
        schedule,
        3,
    )
    assert batches == [2, 2, 2] and torch.allclose(found, by_hand, atol=1e-4)


@pytest.mark.parametrize("stage", [ddim.invert, ddim.sample], ids=["invert", "sample"])
def test_what_the_callback_raises_ends_the_loop_after_that_step(stage):
    seen = []

    def on_step(step: ddim.Step) -> None:
        seen.append((step.stage, step.number, step.total))
        if step.number == 4:
            raise ddim.Stopped

    schedule, text = ddim.Schedule.from_config(SD), torch.zeros(1, 2, 3)
    with pytest.raises(ddim.Stopped):
        stage(smooth, torch.zeros(1, 4, 1, 2, 2), text, schedule, 9, on_step=on_step)
    assert seen == [(stage.__name__, number, 9) for number in (1, 2, 3, 4)]


def test_the_clean_latents_of_every_step_are_those_it_predicts():
    """A network that knows the noise predicts the clean latents exactly, from the first step on, either way."""
    schedule = ddim.Schedule.from_config({})
    clean, noise = torch.randn((2, 1, 4, 2, 3, 3), generator=torch.Generator().manual_seed(1)).double()
    first = schedule.timesteps(5)[0]
    for stage, alpha in ((ddim.sample, schedule.alpha(first)), (ddim.invert, schedule.final_alpha_cumprod)):
        start, seen = ddim.noised(clean, noise, alpha), []
        stage(lambda *_: noise, start, torch.zeros(1, 1, 1), schedule, 5, on_step=seen.append)
        assert [step.number for step in seen] == [1, 2, 3, 4, 5]
        assert max((step.clean - clean).abs().max() for step in seen) < 1e-9


def test_text_may_be_a_mapping_which_the_loop_only_passes():
    """Conditions beside the text reach `predict` in the rows of their latents."""
    schedule, start = ddim.Schedule.from_config(SD), torch.randn(2, 4, 2, 3, 5)
    cond = {"text": torch.full((2, 2, 3), 0.3), "pose": torch.tensor([1.0, 2.0])}
    uncond = {"pose": torch.tensor([1.0, 2.0]), "text": torch.zeros(2, 2, 3)}

    def predict(x: torch.Tensor, t: int, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([smooth(a, t, b) * pose for a, b, pose in zip(x, given["text"], given["pose"], strict=True)])

    found = ddim.sample(predict, start, cond, schedule, 3, unconditional=uncond, guidance_scale=4.0)
    for row in (0, 1):
        one, none = ({name: x[row : row + 1] for name, x in given.items()} for given in (cond, uncond))
        alone = ddim.sample(predict, start[row : row + 1], one, schedule, 3, unconditional=none, guidance_scale=4.0)
        assert torch.allclose(found[row], alone[0], atol=1e-4), f"row {row}"
    assert not torch.allclose(*(x / start[row] for row, x in enumerate(found)), atol=0.1), "its pose counts"
    for other in (uncond["text"], {"text": uncond["text"]}):
        with pytest.raises(InputError, match="not made of the same tensors"):
            ddim.sample(predict, start, cond, schedule, 3, unconditional=other, guidance_scale=4.0)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(InputError, match=str(steps)):
        ddim.Schedule.from_config(SD).timesteps(steps)


def test_unknown_processes_are_refused():
    with pytest.raises(InputError, match="sample"):
        ddim.Schedule.from_config({"prediction_type": "sample"})
    with pytest.raises(InputError, match="squaredcos"):
        ddim.Schedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
