"""Solvers of higher order for the loop of DDIM, as pure functions of what the network has predicted so far.

DDIM takes the clean latents as constant within a step, which is the first order. These follow their change over
λ = log(√ᾱ / √(1-ᾱ)) by the steps before, without a further call of the network.
"""

from __future__ import annotations

import math

from torch import Tensor

from tav_opt.config import SolverName
from tav_opt.ddim import Known, Solver, noised

FEW = 15
"""With fewer steps than these the last one of DPM-Solver++ is of the first order, as diffusers has it."""


def solver(name: SolverName, steps: int) -> Solver | None:
    """A solver for one run of so many steps; None for DDIM, which the loop has of its own."""
    match name:
        case "ddim":
            return None
        case "dpm++":
            return _DpmSolver(steps)
        case "unipc":
            return _UniPC(steps)


def towards(known: Known, clean: Tensor, after: float) -> Tensor:
    """The latents at ᾱ `after`, if these were the clean ones all the way: a step of DDIM, the rest being noise."""
    rest = (known.latents - known.alpha**0.5 * clean) / (1 - known.alpha) ** 0.5
    return noised(clean, rest, after)


def extrapolated(known: Known, before: Known | None, after: float) -> Tensor:
    """The clean latents of the middle of a step in λ, by their change in the step before.

    DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), which UniPC's predictor of the second order with
    B(h) = eʰ - 1 is too (Zhao et al. 2023, arXiv 2302.04867). A step to ᾱ = 1 is endless in λ, and only the
    last predicted ones count.
    """
    if before is None or after == 1:
        return known.clean
    change = (_log_snr(after) - _log_snr(known.alpha)) / (_log_snr(known.alpha) - _log_snr(before.alpha))
    return known.clean + 0.5 * change * (known.clean - before.clean)


def corrected(known: Known, before: Known, earlier: Known | None) -> Tensor:
    """The clean latents of the step from `before` to `known`, now that those at its end are predicted.

    UniPC's corrector (Zhao et al. 2023, algorithm 1) of the second order, of the first without an `earlier` step.
    """
    step = _log_snr(known.alpha) - _log_snr(before.alpha)
    if earlier is None:
        return before.clean + 0.5 * (known.clean - before.clean)
    ratio = (_log_snr(earlier.alpha) - _log_snr(before.alpha)) / step
    first = -1 / step - 1 / math.expm1(-step)  # what the two weights sum up to
    second = 2 * (first / -step - 0.5 / math.expm1(-step))  # and times their places in the step
    by_earlier = (second - first) / (ratio - 1)
    return (
        before.clean
        + by_earlier / ratio * (earlier.clean - before.clean)
        + (first - by_earlier) * (known.clean - before.clean)
    )


def _log_snr(alpha: float) -> float:
    """λ; -∞ where only noise is."""
    return 0.5 * math.log(alpha / (1 - alpha)) if alpha > 0 else -math.inf


class _DpmSolver:
    def __init__(self, steps: int) -> None:
        self._left, self._few = steps, steps < FEW
        self._before: Known | None = None

    def __call__(self, known: Known, after: float) -> Tensor:
        self._left -= 1
        before = None if self._few and not self._left else self._before
        self._before = known
        return towards(known, extrapolated(known, before, after), after)


class _UniPC:
    def __init__(self, steps: int) -> None:
        self._left = steps
        self._before: Known | None = None
        self._earlier: Known | None = None

    def __call__(self, known: Known, after: float) -> Tensor:
        self._left -= 1
        if self._before is not None:
            clean = corrected(known, self._before, self._earlier)
            known = known._replace(latents=towards(self._before, clean, known.alpha))
        before = self._before if self._left else None
        self._earlier, self._before = self._before, known
        return towards(known, extrapolated(known, before, after), after)
