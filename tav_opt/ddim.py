"""DDIM (Song et al. 2021, arXiv 2010.02502): schedule, inversion and sampling as pure functions over `predict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tav_opt.config import InputError

Predict = Callable[[Tensor, int, Tensor], Tensor]
"""`predict(latents (b,c,f,h,w), timestep, text (b,tokens,width)) -> noise or v (b,c,f,h,w)`."""

OnStep = Callable[[int, Tensor], bool | None]
"""Called after each step with its number (from 1) and the latents; returning False stops the loop."""

OnClean = Callable[[int, Tensor], None]
"""Called before `OnStep` with the step's number and the clean latents (b,c,f,h,w) that it predicts."""

PredictionType = Literal["epsilon", "v_prediction"]


class Stopped(Exception):
    """The loop was stopped by its callback."""


@dataclass(frozen=True)
class Schedule:
    """The cumulative products of a diffusion process and what its network predicts."""

    alphas_cumprod: tuple[float, ...]
    """ᾱ_t for t = 0 … T-1."""
    final_alpha_cumprod: float
    """ᾱ before t = 0."""
    prediction_type: PredictionType = "epsilon"
    steps_offset: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Reads any diffusers scheduler config (DDIM, PNDM, …): only the process counts, not the sampler it names."""
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"scheduler: prediction_type {prediction_type!r} is not epsilon or v_prediction")
        betas = _betas(config)
        alphas = tuple(torch.cumprod(1 - betas, 0).tolist())
        final = 1.0 if config.get("set_alpha_to_one", True) else alphas[0]
        return cls(alphas, final, cast(PredictionType, prediction_type), int(config.get("steps_offset", 0)))

    def timesteps(self, steps: int) -> list[int]:
        """The `steps` timesteps of sampling, highest first (leading spacing)."""
        if not 1 <= steps <= len(self.alphas_cumprod):
            raise InputError(f"steps {steps} is not within 1…{len(self.alphas_cumprod)}")
        stride = len(self.alphas_cumprod) // steps
        return [min(i * stride + self.steps_offset, len(self.alphas_cumprod) - 1) for i in reversed(range(steps))]

    def alpha(self, timestep: int) -> float:
        """ᾱ at a timestep; before the first one, the final value."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod


def _betas(config: Mapping[str, Any]) -> Tensor:
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    start, end, count = (
        config.get("beta_start", 1e-4),
        config.get("beta_end", 0.02),
        config.get("num_train_timesteps", 1000),
    )
    match config.get("beta_schedule", "linear"):
        case "linear":
            return torch.linspace(start, end, count, dtype=torch.float32)
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
        case other:
            raise InputError(f"scheduler: beta_schedule {other!r} is not linear or scaled_linear")


def _clean_and_noise(latents: Tensor, predicted: Tensor, alpha: float, kind: PredictionType) -> tuple[Tensor, Tensor]:
    """The clean latents x₀ and the noise ε that a prediction at ᾱ stands for (v: Salimans & Ho 2022, appendix D)."""
    a, s = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "v_prediction":
        return a * latents - s * predicted, a * predicted + s * latents
    return (latents - s * predicted) / a, predicted


def step(schedule: Schedule, latents: Tensor, predicted: Tensor, alpha: float, alpha_next: float) -> Tensor:
    """One deterministic DDIM step between two noise levels, in either direction (equation 12 with σ = 0)."""
    clean, noise = _clean_and_noise(latents, predicted, alpha, schedule.prediction_type)
    return alpha_next**0.5 * clean + (1 - alpha_next) ** 0.5 * noise


def stochastic_step(
    schedule: Schedule, latents: Tensor, predicted: Tensor, alpha: float, alpha_next: float, eta: float, noise: Tensor
) -> Tensor:
    """One DDIM step with σ = η √((1-ᾱ')/(1-ᾱ)) √(1-ᾱ/ᾱ') (equations 12 and 16)."""
    clean, predicted_noise = _clean_and_noise(latents, predicted, alpha, schedule.prediction_type)
    sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
    return alpha_next**0.5 * clean + (1 - alpha_next - sigma**2) ** 0.5 * predicted_noise + sigma * noise


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6)."""
    return unconditional + scale * (conditional - unconditional)


def _report(on_step: OnStep | None, number: int, latents: Tensor) -> None:
    if on_step is not None and on_step(number, latents) is False:
        raise Stopped


@torch.no_grad()
def invert(
    predict: Predict, latents: Tensor, text: Tensor, schedule: Schedule, steps: int, *, on_step: OnStep | None = None
) -> Tensor:
    """The noise that unguided DDIM sampling would turn into `latents`.

    latents (b,c,f,h,w), text (b,tokens,width) → (b,c,f,h,w). The noise is predicted at the *next* timestep from the
    present latents, as the reference does. Raises Stopped when `on_step` returns False.
    """
    timesteps = schedule.timesteps(steps)
    stride = len(schedule.alphas_cumprod) // steps
    for number, timestep in enumerate(reversed(timesteps), start=1):
        before = min(timestep - stride, len(schedule.alphas_cumprod) - 1)
        predicted = predict(latents, timestep, text)
        latents = step(schedule, latents, predicted, schedule.alpha(before), schedule.alpha(timestep))
        _report(on_step, number, latents)
    return latents


@torch.no_grad()
def sample(
    predict: Predict,
    latents: Tensor,
    text: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    unconditional: Tensor | None = None,
    guidance_scale: float = 1.0,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    on_step: OnStep | None = None,
    on_clean: OnClean | None = None,
) -> Tensor:
    """DDIM sampling from `latents`, guided where `unconditional` text is given (one call with both batches).

    latents (b,c,f,h,w), text and unconditional (b,tokens,width) → (b,c,f,h,w). The noise of `eta` is one draw for all
    of the batch, so that each sample is what it would be alone. Raises Stopped when `on_step` returns False.
    """
    guided = unconditional is not None and guidance_scale != 1.0
    both = torch.cat([cast(Tensor, unconditional), text]) if guided else text
    stride = len(schedule.alphas_cumprod) // steps if steps > 0 else 0
    for number, timestep in enumerate(schedule.timesteps(steps), start=1):
        if guided:
            without, with_text = predict(torch.cat([latents, latents]), timestep, both).chunk(2)
            predicted = guide(without, with_text, guidance_scale)
        else:
            predicted = predict(latents, timestep, both)
        alpha, after = schedule.alpha(timestep), schedule.alpha(timestep - stride)
        if on_clean is not None:
            on_clean(number, _clean_and_noise(latents, predicted, alpha, schedule.prediction_type)[0])
        if eta > 0:
            noise = torch.randn(latents[:1].shape, generator=generator, dtype=latents.dtype).to(latents.device)
            latents = stochastic_step(schedule, latents, predicted, alpha, after, eta, noise)
        else:
            latents = step(schedule, latents, predicted, alpha, after)
        _report(on_step, number, latents)
    return latents
