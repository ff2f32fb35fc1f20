"""Solvers of higher order against diffusers' schedulers, step by step, and guidance that is asked for now and then."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from tav_opt import ddim
from tav_opt.solvers import solver

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = SD | {"prediction_type": "v_prediction"}
ZERO_SNR = V | {"rescale_betas_zero_snr": True}
KINDS = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
TEXT = torch.full((1, 2, 3), 0.05)
START = torch.randn(1, 4, 2, 3, 5, generator=torch.Generator().manual_seed(1))


def smooth(latents: torch.Tensor, timestep: int | torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """A made-up network: depends on all it is given, and smoothly."""
    return torch.tanh(latents * 0.7 + timestep / 1000) * 0.5 + text.mean() * latents


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 14, 15, 30])
@pytest.mark.parametrize("end", ["zero", "sigma_min"], ids=["to-no-noise", "to-the-least"])
@pytest.mark.parametrize("process", [SD, V, ZERO_SNR], ids=["ε", "v", "zero"])
@pytest.mark.parametrize("name", KINDS)
def test_every_step_is_that_of_diffusers(name, process, end, steps):
    """Its timesteps are its own affair: ᾱ is taken from there, and steps alone are compared."""
    config = process | {"timestep_spacing": "trailing" if process is ZERO_SNR else "leading", "solver_order": 2}
    scheduler = KINDS[name](**config, final_sigmas_type=end)
    scheduler.set_timesteps(steps)
    alphas = [float(1 / (1 + sigma.double() ** 2)) for sigma in scheduler.sigmas]
    step, kind = solver(name, steps), scheduler.config.prediction_type
    x = ours = START
    for t, alpha, after in zip(scheduler.timesteps, alphas[:-1], alphas[1:], strict=True):
        clean, noise = ddim.clean_and_noise(ours, smooth(ours, t, TEXT), alpha, kind)
        ours = step(ddim.Known(alpha, ours, clean, noise), after)
        x = scheduler.step(smooth(x, t, TEXT), t, x).prev_sample
        assert (ours - x).abs().max() < 2e-4 * x.abs().max(), int(t)


def exact(schedule: ddim.Schedule) -> torch.Tensor:
    """DDIM's error is as its step: that of 1000 steps is taken off by that of 500 (Richardson)."""
    half, whole = (ddim.sample(smooth, START, TEXT, schedule, steps) for steps in (500, 1000))
    return 2 * whole - half


@pytest.mark.parametrize("name", KINDS)
def test_they_come_nearer_to_the_solution_than_ddim_in_as_many_steps(name):
    """And twice as many steps bring a method of the second order nearer by more than one of the first."""
    schedule = ddim.Schedule.from_config(SD | {"set_alpha_to_one": False, "timestep_spacing": "trailing"})

    truth = exact(schedule)

    def error(steps: int, kind: str) -> float:
        found = ddim.sample(smooth, START, TEXT, schedule, steps, solver=solver(kind, steps))
        return (found - truth).abs().mean().item()

    assert error(20, name) < 0.3 * error(20, "ddim")
    assert error(20, name) / error(40, name) > 1.3 * error(20, "ddim") / error(40, "ddim")


def test_the_whole_loop_takes_a_solver_and_ends_finite_where_no_noise_is_left():
    for name in KINDS:
        for process in (SD, ZERO_SNR | {"timestep_spacing": "trailing"}):
            schedule = ddim.Schedule.from_config(process)
            for steps in (1, 2, 7, 20):
                found = ddim.sample(smooth, START, TEXT, schedule, steps, solver=solver(name, steps))
                assert found.isfinite().all(), (name, steps)


class Counting:
    """Without and with the prompt: the difference that the prompt makes is that of the texts' means, at every step."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(latents))
        return smooth(latents, timestep, torch.zeros(1)) + text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("steps, interval, whole", [(10, 4, {0, 1, 4, 8}), (20, 2, {0, 1, 2, 3, *range(4, 20, 2)})])
def test_guidance_is_asked_for_in_the_first_fifth_and_then_now_and_then(steps, interval, whole):
    schedule = ddim.Schedule.from_config(SD)
    found, every = Counting(), Counting()
    options = {"unconditional": torch.zeros(1, 2, 3), "guidance_scale": 7.5}
    cheap = ddim.sample(found, START, TEXT, schedule, steps, guidance_interval=interval, **options)
    exact = ddim.sample(every, START, TEXT, schedule, steps, **options)
    assert found.batches == [2 if number in whole else 1 for number in range(steps)]
    assert every.batches == [2] * steps
    assert torch.allclose(cheap, exact, atol=1e-4), "a difference that does not change may be kept"


def test_guidance_that_changes_is_followed():
    """A difference that grows is that of the last step that asked, and so another edit."""
    schedule = ddim.Schedule.from_config(SD)

    def growing(latents, timestep, text):
        return text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1) * timestep / 1000 + 0 * latents

    options = {"unconditional": torch.zeros(1, 2, 3), "guidance_scale": 3.0}
    seen = []
    ddim.sample(growing, START, TEXT, schedule, 10, guidance_interval=4, on_step=seen.append, **options)
    noise = [(step.latents, schedule.alpha(t)) for step, t in zip(seen, schedule.timesteps(10), strict=True)]
    assert len(noise) == 10
    x = START
    for number, t in enumerate(schedule.timesteps(10)):
        kept = schedule.timesteps(10)[number if number < 2 else number // 4 * 4 if number >= 4 else 1]
        predicted = 0.05 * t / 1000 + 2.0 * 0.05 * kept / 1000
        clean = (x - (1 - schedule.alpha(t)) ** 0.5 * predicted) / schedule.alpha(t) ** 0.5
        x = ddim.noised(clean, torch.full_like(x, predicted), schedule.alpha_before(t, 10))
        assert torch.allclose(seen[number].latents, x, atol=1e-5), number
