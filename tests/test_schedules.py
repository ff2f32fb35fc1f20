"""Schedules as configurations name them: zero terminal SNR and spacings, against diffusers; what is refused."""

from __future__ import annotations

import inspect
import json
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

from tav_opt import ddim, tuning_step
from tav_opt.config import InputError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
ZERO_SNR = SD | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SPACINGS = ("leading", "trailing", "linspace")
STEPS = (1, 2, 7, 50, 333)
TEXT = torch.full((1, 2, 3), 0.05)
START = torch.randn(1, 4, 2, 3, 5, generator=torch.Generator().manual_seed(1))


def smooth(latents: torch.Tensor, timestep: int, text: torch.Tensor) -> torch.Tensor:
    """A made-up network: depends on all it is given, and smoothly."""
    return torch.tanh(latents * 0.7 + timestep / 1000) * 0.5 + text.mean() * latents


def theirs(config: dict) -> DDIMScheduler:
    return DDIMScheduler(**config, clip_sample=False)


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True), start=1):
        error = (a - b).abs().max() / b.abs().max()
        assert error < 1e-4, f"step {number} of {len(expected)}: relative error {error:.1e}"


def sampled(schedule: ddim.Schedule, steps: int, eta: float) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    noise = torch.Generator().manual_seed(4)
    on_step = lambda step: found.append(step.latents)  # noqa: E731
    ddim.sample(smooth, START, TEXT, schedule, steps, eta=eta, generator=noise, on_step=on_step)
    return found


def sampled_by_diffusers(scheduler: DDIMScheduler, steps: int, eta: float) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    found, x, noise = [], START, torch.Generator().manual_seed(4)
    for t in scheduler.timesteps.tolist():
        drawn = torch.randn(x.shape, generator=noise)
        x = scheduler.step(smooth(x, t, TEXT), t, x, eta=eta, variance_noise=drawn if eta else None).prev_sample
        found.append(x)
    return found


def inverted(schedule: ddim.Schedule, steps: int) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    ddim.invert(smooth, START, TEXT, schedule, steps, on_step=lambda step: found.append(step.latents))
    return found


def inverted_by_diffusers(scheduler: DDIMInverseScheduler, steps: int) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    found, x = [], START
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(smooth(x, t, TEXT), t, x).prev_sample
        found.append(x)
    return found


@pytest.mark.parametrize("count", [1000, 999, 50])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers_for_every_number_of_steps(spacing, count):
    config = SD | {"timestep_spacing": spacing, "num_train_timesteps": count}
    schedule, scheduler = ddim.Schedule.from_config(config), theirs(config)
    for steps in range(1, count + 1):
        scheduler.set_timesteps(steps)
        # Rounding of floats gives some numbers of trailing steps a further timestep −1 there, which is none.
        expected = scheduler.timesteps.tolist()[:steps]
        assert schedule.timesteps(steps) == expected and min(expected) >= 0, steps


def test_trailing_timesteps_of_the_paper():
    assert ddim.Schedule.from_config(ZERO_SNR | {"timestep_spacing": "trailing"}).timesteps(10) == [
        *(999, 899, 799, 699, 599, 499, 399, 299, 199, 99)
    ]


@pytest.mark.parametrize("count", [1000, 50])
@pytest.mark.parametrize("process", [SD, SD | {"beta_schedule": "linear"}])
def test_zero_terminal_snr_is_that_of_diffusers(process, count):
    config = process | {k: ZERO_SNR[k] for k in ("prediction_type", "rescale_betas_zero_snr")}
    config |= {"num_train_timesteps": count}
    found, expected = ddim.Schedule.from_config(config), theirs(config)
    assert found.alphas_cumprod[-1] == expected.alphas_cumprod[-1] == 0
    assert np.allclose(found.alphas_cumprod, expected.alphas_cumprod.numpy(), rtol=1e-3, atol=1e-6)
    assert math.isclose(found.final_alpha_cumprod, expected.final_alpha_cumprod, rel_tol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("process", [SD, SD | {"prediction_type": "v_prediction"}, ZERO_SNR], ids=["ε", "v", "zero"])
def test_sampling_is_that_of_diffusers_step_by_step(process, spacing, eta):
    config = process | {"timestep_spacing": spacing, "steps_offset": 1}
    schedule, scheduler = ddim.Schedule.from_config(config), theirs(config)
    for steps in STEPS:
        equal(sampled(schedule, steps, eta), sampled_by_diffusers(scheduler, steps, eta))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # the inverse scheduler has no linspace
@pytest.mark.parametrize("process", [SD, SD | {"prediction_type": "v_prediction"}, ZERO_SNR], ids=["ε", "v", "zero"])
def test_inversion_is_that_of_diffusers_step_by_step(process, spacing):
    config = process | {"timestep_spacing": spacing}
    schedule, scheduler = ddim.Schedule.from_config(config), DDIMInverseScheduler(**config, clip_sample=False)
    for steps in STEPS:
        equal(inverted(schedule, steps), inverted_by_diffusers(scheduler, steps))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_what_was_inverted_samples_back(spacing):
    """Linspace too, which diffusers does not invert."""
    schedule = ddim.Schedule.from_config(SD | {"timestep_spacing": spacing, "steps_offset": 1})
    noise = ddim.invert(smooth, START, TEXT, schedule, 250)
    assert (ddim.sample(smooth, noise, TEXT, schedule, 250) - START).abs().mean() < 0.02


def test_all_noise_from_zero_snr_is_finite_where_rounding_goes_below_zero():
    schedule = ddim.Schedule.from_config(ZERO_SNR | {"timestep_spacing": "trailing"})
    for steps in range(1, 60):
        noise = torch.Generator().manual_seed(0)
        found = ddim.sample(smooth, START, TEXT, schedule, steps, eta=1.0, generator=noise)
        assert found.dtype == torch.float32 and found.isfinite().all(), steps


@pytest.mark.parametrize("process", [SD, SD | {"prediction_type": "v_prediction"}, ZERO_SNR], ids=["ε", "v", "zero"])
def test_tuning_sees_the_noise_and_the_target_of_diffusers(process):
    """At the last timestep of zero terminal SNR: pure noise in, the clip wanted, by its negative."""
    latents, noise, t = START, torch.randn_like(START), torch.tensor([999])
    scheduler = theirs(process)
    seen = []

    def unet(noisy: torch.Tensor, _timesteps: torch.Tensor, _text: torch.Tensor) -> torch.Tensor:
        seen.append(noisy)
        return torch.zeros_like(noisy)

    loss = tuning_step.denoising_loss(unet, latents, TEXT, ddim.Schedule.from_config(process), noise, t)
    target = scheduler.get_velocity(latents, noise, t) if "prediction_type" in process else noise
    assert torch.allclose(seen[0], scheduler.add_noise(latents, noise, t), atol=1e-5)
    assert torch.allclose(loss, target.square().mean(), rtol=1e-5)
    if process is ZERO_SNR:
        assert torch.equal(seen[0], noise) and torch.allclose(loss, latents.square().mean())


def test_files_that_went_wrong(shared):
    zero, trailing = (
        ddim.Schedule.from_config(json.loads((shared / "inputs" / f"{name}.scheduler_config.json").read_text()))
        for name in ("ztsnr_v", "trailing")
    )
    assert zero.alphas_cumprod[999] == 0 and trailing.alphas_cumprod[999] > 0
    assert zero.timesteps(50) == trailing.timesteps(50) == list(range(999, 0, -20))


OTHER_PROCESS = {"EDMEulerScheduler"}
NOT_INSTALLED = {"DPMSolverSDEScheduler", "LMSDiscreteScheduler"}  # they need torchsde and scipy


@pytest.mark.parametrize(
    "name", sorted({k.name for k in KarrasDiffusionSchedulers} - OTHER_PROCESS - NOT_INSTALLED | {"LCMScheduler"})
)
def test_the_configuration_of_every_sampler_for_stable_diffusion_is_read(name):
    kind = getattr(diffusers, name)
    taken = inspect.signature(kind.__init__).parameters
    config = SD | {"skip_prk_steps": True, "use_karras_sigmas": True}
    schedule = ddim.Schedule.from_config(dict(kind(**{k: v for k, v in config.items() if k in taken}).config))
    assert schedule.alphas_cumprod == ddim.Schedule.from_config(SD).alphas_cumprod


def test_trained_betas_are_the_process():
    betas = np.linspace(1e-3, 0.3, 40).tolist()
    found = ddim.Schedule.from_config({"trained_betas": betas, "num_train_timesteps": 40})
    assert np.allclose(found.alphas_cumprod, np.cumprod(1 - np.array(betas)), rtol=1e-5)


@pytest.mark.parametrize(
    "config, words",
    [
        (SD | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr.*only v_prediction"),
        ({"trained_betas": [0.1, 1.0], "num_train_timesteps": 2}, "only v_prediction"),
        ({"timestep_spacing": "trialing"}, "timestep_spacing 'trialing' is not leading, trailing, linspace"),
        ({"prediction_type": "sample"}, "prediction_type 'sample' is not epsilon, v_prediction"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"thresholding": True}, "thresholding True is not supported"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"snr_shift_scale": 3.0}, r"snr_shift_scale 3\.0"),
        ({"brightness": 0.5}, r"entry brightness 0\.5 is unknown"),
        ({"trained_betas": [0.1, 0.2]}, "num_train_timesteps 1000"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps 'many'"),
        ({"num_train_timesteps": 10**12}, "within 1…100000"),
        ({"beta_start": math.nan}, "above 0"),
        ({"beta_start": -1, "beta_schedule": "scaled_linear"}, "scheduler"),
        ({"beta_start": None}, "betas cannot be made of its entries"),
        ({"steps_offset": 0.5}, r"steps_offset 0\.5"),
        ({"steps_offset": -3}, "steps_offset -3"),
    ],
)
def test_what_ddim_cannot_follow_is_refused_in_one_line(config, words):
    with pytest.raises(InputError, match=words) as raised:
        ddim.Schedule.from_config(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("entry", [{"brightness": None}, {"thresholding": False}, {"_note": 1}, {"clip_sample": True}])
def test_what_is_off_or_changes_nothing_is_not_refused(entry):
    assert ddim.Schedule.from_config(SD | entry) == ddim.Schedule.from_config(SD)
