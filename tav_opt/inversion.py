"""DDIM inversion that comes back: each step is refined until sampling's own step leads from its end to its start.

A step of DDIM inversion asks the network at the step's clean end, since the noisy end is not known yet (`ddim.invert`,
as the reference has it). The noisy end that sampling comes from is a fixed point of the step, and iterations find it:
AIDI (Pan et al. 2023, arXiv 2309.04907), Meiri et al. 2023 (arXiv 2312.12540).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tav_opt import ddim
from tav_opt.config import InputError, InversionConfig
from tav_opt.ddim import OnStep, Predict, Schedule, Step, Text

ENOUGH = 4e-3
"""A step's iterations end where the next is expected to change its noisy end, relative to it, by less than so many √ᾱ:
on the way back an error is divided by √ᾱ at most, where the network would not see it."""
TINY = 1e-20
"""In the place of a length of zero, to divide by."""


@torch.no_grad()
def invert(
    predict: Predict,
    latents: Tensor,
    text: Text,
    schedule: Schedule,
    config: InversionConfig,
    *,
    on_step: OnStep = lambda _: None,
) -> Tensor:
    """The noise (b,c,f,h,w) that unguided DDIM sampling would turn into `latents` (b,c,f,h,w).

    Without iterations it is `ddim.invert`, bit for bit. With them the network is asked at the noisy end of each step,
    whose prediction is first taken to go on as in the two steps before, and then up to `config.iterations` more times,
    as long as another answer is expected to change the latents by ENOUGH. Raises InputError for a step that has no
    inverse, FloatingPointError where the network answers with NaN or infinity.
    """
    if not config.iterations:
        return _finite(ddim.invert(predict, latents, text, schedule, config.steps, on_step=on_step))
    return _each_refined(predict, latents, text, schedule, config, on_step)


def _finite(values: Tensor) -> Tensor:
    """The values themselves."""
    if values.isfinite().logical_not().any():
        raise FloatingPointError("inversion: the network answers with NaN or infinity")
    return values


def _each_refined(
    predict: Predict, latents: Tensor, text: Text, schedule: Schedule, config: InversionConfig, on_step: OnStep
) -> Tensor:
    """As `invert`, with iterations."""
    before: tuple[Tensor, ...] = ()
    refine = _Refinement(config.iterations)
    for number, timestep, on_device in ddim.each_timestep(schedule, latents, config.steps, upward=True):
        step, enough = _StepBack.of(schedule, timestep, config.steps), ENOUGH * schedule.alpha(timestep) ** 0.5

        def ask(noisy: Tensor, on_device: Tensor = on_device) -> Tensor:
            return _finite(predict(noisy, on_device, text))

        first = _continued(before) if before else ask(latents)
        latents, predicted = refine(ask, step, latents, first, enough)
        before = (*before[-1:], predicted)
        clean, _ = ddim.clean_and_noise(latents, predicted, schedule.alpha(timestep), schedule.prediction_type)
        on_step(Step("invert", number, config.steps, latents, clean))
    return latents


@dataclass(frozen=True)
class _StepBack:
    """A step of sampling, `of_noisy` · noisy + `of_predicted` · predicted, solved for its noisy end."""

    of_noisy: float
    of_predicted: float

    @classmethod
    def of(cls, schedule: Schedule, timestep: int, steps: int) -> _StepBack:
        alpha, after = schedule.alpha(timestep), schedule.alpha_before(timestep, steps)
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        signal_after, noise_after = after**0.5, (1 - after) ** 0.5
        if schedule.prediction_type == "v_prediction":
            found = cls(signal_after * signal + noise_after * noise, noise_after * signal - signal_after * noise)
        else:
            found = cls(signal_after / signal, noise_after - signal_after * noise / signal)
        if found.of_noisy == 0:
            raise InputError(f"inversion steps {steps}: no picture tells the pure noise it is one step from; take more")
        return found

    def __call__(self, clean_end: Tensor, predicted: Tensor) -> Tensor:
        return (clean_end - self.of_predicted * predicted) / self.of_noisy


def _continued(before: tuple[Tensor, ...]) -> Tensor:
    """The next of what the network predicts, as if it changed by as much as from the last but one to the last."""
    return before[-1] if len(before) == 1 else 2 * before[-1] - before[-2]


class _Refinement:
    """Finds the noisy ends of one inversion's steps by Anderson's acceleration with a memory of one, as AIDI does."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations
        self._slope = 1.0
        """How far apart the latest two answers led, over how far apart they were asked for."""

    def __call__(
        self, ask: Callable[[Tensor], Tensor], step: _StepBack, clean_end: Tensor, first: Tensor, enough: float
    ) -> tuple[Tensor, Tensor]:
        """The noisy end of a step, and the prediction that leads from there to its clean end: of all that was tried
        what another answer is expected to change least."""
        noisy, least, best, before = step(clean_end, first), float("inf"), (clean_end, first), None
        for _ in range(self._iterations + 1):
            predicted = ask(noisy)
            now = _Tried(noisy, predicted, step(clean_end, predicted) - noisy)
            if before is not None:
                self._slope = abs(step.of_predicted / step.of_noisy) * now.slope(before)
            predicted, left = now.between(before)
            noisy, before = step(clean_end, predicted), now
            if (expected := self._slope * float(left.norm() / noisy.norm().clamp_min(TINY))) < least:
                least, best = expected, (noisy, predicted)
            if expected <= enough:
                break
        return best


@dataclass(frozen=True)
class _Tried:
    """A noisy end that the network was asked for."""

    noisy: Tensor
    predicted: Tensor
    change: Tensor
    """From it to where the prediction leads."""

    def slope(self, other: _Tried) -> float:
        """How far apart the predictions are, over how far apart the noisy ends are."""
        return float((self.predicted - other.predicted).norm() / (self.noisy - other.noisy).norm().clamp_min(TINY))

    def between(self, other: _Tried | None) -> tuple[Tensor, Tensor]:
        """A prediction on the line through both, and what is left there of their changes, the least of that line."""
        if other is None:
            return self.predicted, self.change
        turn = self.change - other.change
        wide = turn.float()
        share = float((self.change.float() * wide).sum() / wide.square().sum().clamp_min(TINY))
        return self.predicted - share * (self.predicted - other.predicted), self.change - share * turn
