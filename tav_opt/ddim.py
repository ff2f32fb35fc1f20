"""DDIM (Song et al. 2021, arXiv 2010.02502): schedule, inversion and sampling as pure functions over `predict`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor

from tav_opt.config import InputError
from tav_opt.device import Pace

Text = Tensor | Mapping[str, Tensor]
"""What `predict` is told beside the latents: text (b,tokens,width), or a mapping of tensors, whose first axis is b."""

Timestep = int | Tensor
"""A number, or an int64 tensor () on the latents' device, which is what the loop passes."""

Predict = Callable[[Tensor, Any, Any], Tensor]
"""`predict(latents (b,c,f,h,w), timestep, text) -> noise or v (b,c,f,h,w)`; the loop passes its text on unread."""

PredictionType = Literal["epsilon", "v_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]

_PROCESS = frozenset(
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas rescale_betas_zero_snr set_alpha_to_one "
    "steps_offset prediction_type timestep_spacing".split()
)
"""Entries of a scheduler's configuration that DDIM follows."""
_REFUSED = frozenset("thresholding use_flow_sigmas use_dynamic_shifting snr_shift_scale".split())
"""Entries that, where they are on, mean another process, or other results of this one."""
_NEEDLESS = frozenset(
    "clip_sample clip_sample_range dynamic_thresholding_ratio sample_max_value skip_prk_steps use_karras_sigmas "
    "use_exponential_sigmas use_beta_sigmas use_lu_lambdas final_sigmas_type sigma_min sigma_max lower_order_final "
    "euler_at_final lambda_min_clipped variance_type algorithm_type solver_order solver_type solver_p predict_x0 "
    "disable_corrector predictor_order corrector_order tau_func interpolation_type timestep_type timestep_scaling "
    "original_inference_steps noise_sampler_seed flow_shift time_shift_type shift_terminal".split()
)
"""Entries that only tell how samplers other than DDIM step, and those of what is off. `clip_sample` is among them since
every Stable Diffusion pipeline, the reference's too, switches it off: latents are not bounded by ±1."""


class Stopped(Exception):
    """Raised by whoever is told of a step, to end the loop there."""


@dataclass(frozen=True)
class Step:
    """One step that is done."""

    stage: Literal["invert", "sample"]
    number: int
    """From 1."""
    total: int
    latents: Tensor
    """(b,c,f,h,w), what it led to."""
    clean: Tensor
    """(b,c,f,h,w), the clean latents that it predicts."""


class Known(NamedTuple):
    """A run at the noisy end of one of its steps; the network has just been asked."""

    alpha: float
    """ᾱ."""
    latents: Tensor
    """(b,c,f,h,w)."""
    clean: Tensor
    """(b,c,f,h,w), the predicted clean latents x₀."""
    noise: Tensor
    """(b,c,f,h,w), the predicted noise ε."""


Solver = Callable[[Known, float], Tensor]
"""What is known, ᾱ at the step's clean end → the latents there; one that looks back serves a single run."""
MAX_TIMESTEPS = 100_000
"""Of a diffusion process, a hundred times those of Stable Diffusion."""
Blend = Callable[[Tensor, float], Tensor]
"""Latents that a step led to, ᾱ there → those that sampling goes on from in their place."""
OnStep = Callable[[Step], object]
"""Told of every step; what it raises, such as Stopped, goes through."""


@dataclass(frozen=True)
class Schedule:
    """The cumulative products of a diffusion process and what its network predicts."""

    alphas_cumprod: tuple[float, ...]
    """ᾱ_t for t = 0 … T-1."""
    final_alpha_cumprod: float
    """ᾱ before t = 0."""
    prediction_type: PredictionType = "epsilon"
    steps_offset: int = 0
    """Added to leading timesteps."""
    spacing: Spacing = "leading"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Reads any diffusers scheduler config (DDIM, PNDM, …): only the process counts, not the sampler it names.

        Raises InputError for entries that are unknown, or ask for what DDIM here does not do.
        """
        _check_entries(config)
        prediction_type = _one_of(PredictionType, config, "prediction_type", "epsilon")
        spacing = _one_of(Spacing, config, "timestep_spacing", "leading")
        alphas_cumprod = torch.cumprod(1 - _betas(config), 0)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = _with_zero_terminal_snr(alphas_cumprod)
        alphas = tuple(alphas_cumprod.tolist())
        if prediction_type == "epsilon" and alphas[-1] == 0:
            raise InputError(
                "scheduler: prediction_type 'epsilon' with ᾱ = 0 at the end (rescale_betas_zero_snr) tells nothing of "
                "the picture there: only v_prediction can have it"
            )
        offset = config.get("steps_offset", 0)
        if not isinstance(offset, int) or not 0 <= offset < len(alphas):
            raise InputError(f"scheduler: steps_offset {offset!r} is no whole number within 0…{len(alphas) - 1}")
        final = 1.0 if config.get("set_alpha_to_one", True) else alphas[0]
        return cls(alphas, final, cast(PredictionType, prediction_type), offset, cast(Spacing, spacing))

    def timesteps(self, steps: int) -> list[int]:
        """The `steps` timesteps of sampling, highest first (Lin et al. 2024, arXiv 2305.08891, table 2)."""
        count = len(self.alphas_cumprod)
        if not 1 <= steps <= count:
            raise InputError(f"steps {steps} is not within 1…{count}")
        match self.spacing:
            case "leading":
                return [min(i * (count // steps) + self.steps_offset, count - 1) for i in reversed(range(steps))]
            case "trailing":  # as floats of NumPy, whose halves fall as diffusers' do; it may give one more: that is −1
                return [int(t) - 1 for t in np.arange(count, 0, -count / steps).round()[:steps]]
            case "linspace":
                return [int(t) for t in np.linspace(0, count - 1, steps).round()[::-1]]

    def alpha(self, timestep: int) -> float:
        """ᾱ at a timestep; before the first one, the final value."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod

    def alpha_before(self, timestep: int, steps: int) -> float:
        """ᾱ at the cleaner end of a step from or to a timestep: T // steps below, whatever the spacing."""
        return self.alpha(timestep - len(self.alphas_cumprod) // steps)


def _check_entries(config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name in _REFUSED and value:
            raise InputError(f"scheduler: {name} {value!r} is not supported: DDIM here has none of it")
        known = name in _PROCESS | _REFUSED | _NEEDLESS or name.startswith("_")
        if not known and value is not None and value is not False:
            raise InputError(f"scheduler: entry {name} {value!r} is unknown, and may change what is drawn")


def _one_of(kind: Any, config: Mapping[str, Any], name: str, default: str) -> str:
    value = config.get(name, default)
    if value not in get_args(kind):
        raise InputError(f"scheduler: {name} {value!r} is not {', '.join(get_args(kind))}")
    return cast(str, value)


def _betas(config: Mapping[str, Any]) -> Tensor:
    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or not 1 <= count <= MAX_TIMESTEPS:
        raise InputError(f"scheduler: num_train_timesteps {count!r} is no whole number within 1…{MAX_TIMESTEPS}")
    try:
        betas = _given_or_made(config, count)
    except (TypeError, RuntimeError) as error:
        raise InputError(f"scheduler: betas cannot be made of its entries: {str(error).splitlines()[0]}") from None
    if betas.shape != (count,) or not count or not ((betas > 0) & (betas <= 1)).all():
        raise InputError(f"scheduler: betas are not num_train_timesteps {count} numbers above 0 and up to 1")
    return betas


def _given_or_made(config: Mapping[str, Any], count: int) -> Tensor:
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    match config.get("beta_schedule", "linear"):
        case "linear":
            return torch.linspace(start, end, count, dtype=torch.float32)
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
        case other:
            raise InputError(f"scheduler: beta_schedule {other!r} is not linear or scaled_linear")


def _with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """√ᾱ shifted and scaled so that the last is 0 and the first stays (Lin et al. 2024, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


def clean_and_noise(latents: Tensor, predicted: Tensor, alpha: float, kind: PredictionType) -> tuple[Tensor, Tensor]:
    """The clean latents x₀ and the noise ε that a prediction at ᾱ stands for (v: Salimans & Ho 2022, appendix D)."""
    a, s = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "v_prediction":
        return a * latents - s * predicted, a * predicted + s * latents
    return (latents - s * predicted) / a, predicted


def noised(clean: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """√ᾱ x₀ + √(1-ᾱ) ε: where a deterministic DDIM step leads, in either direction (equation 12 with σ = 0)."""
    return alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise


def stochastically_noised(
    clean: Tensor, noise: Tensor, fresh: Tensor, alpha: float, alpha_next: float, eta: float
) -> Tensor:
    """As `noised`, from ᾱ to ᾱ', with `fresh` noise by σ = η √((1-ᾱ')/(1-ᾱ)) √(1-ᾱ/ᾱ') (equations 12 and 16)."""
    sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
    rest = max(0.0, 1 - alpha_next - sigma**2)  # from ᾱ = 0 with η = 1 it is 0, or by rounding less
    return alpha_next**0.5 * clean + rest**0.5 * noise + sigma * fresh


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6)."""
    return unconditional + scale * (conditional - unconditional)


class Guided:
    """`predict` with classifier-free guidance, asked once a step of so many.

    With an interval k the difference that the text makes is computed in the first fifth of the steps and in each k-th
    one after; in between the last one stands for it, and the network is asked for the text's half alone (the idea of
    FasterCache's CFG-Cache, Lv et al. 2024, arXiv 2410.19355, without its weighting of frequencies).
    """

    EARLY = 0.2
    """The share of the steps in which the layout comes about."""

    def __init__(self, predict: Predict, unconditional: Text, scale: float, interval: int, steps: int) -> None:
        self._predict, self._unconditional, self._scale = predict, unconditional, scale
        self._interval, self._early = interval, self.EARLY * steps
        self._done = 0
        self._difference: Tensor | None = None

    def __call__(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        number, self._done = self._done, self._done + 1
        if self._difference is not None and number >= self._early and number % self._interval:
            return self._predict(latents, timestep, text) + (self._scale - 1) * self._difference
        both = _both(self._unconditional, text)
        without, with_text = self._predict(torch.cat([latents, latents]), timestep, both).chunk(2)
        if self._interval > 1:
            self._difference = with_text - without
        return guide(without, with_text, self._scale)


def _both(unconditional: Text, text: Text) -> Text:
    """One batch of the two, which are of one kind and have the same names."""
    if isinstance(unconditional, Tensor) and isinstance(text, Tensor):
        return torch.cat([unconditional, text])
    if isinstance(unconditional, Tensor) or isinstance(text, Tensor) or unconditional.keys() != text.keys():
        raise InputError("the unconditional text and the text are not made of the same tensors")
    return {name: torch.cat([unconditional[name], text[name]]) for name in text}


def timestep_rows(timestep: Timestep, latents: Tensor) -> Tensor:
    """The timestep of each clip in `latents`, on their device: int64 (b,), without a copy of one that is there."""
    return torch.as_tensor(timestep).to(latents.device).expand(len(latents))


def each_timestep(
    schedule: Schedule, latents: Tensor, steps: int, *, upward: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Each step's number, timestep, and timestep on the latents' device, where all are put by one copy.

    A step is given out when the one before the last has been computed: whoever counts or ends steps is close behind.
    """
    timesteps, pace = schedule.timesteps(steps), Pace(latents.device)
    timesteps = timesteps[::-1] if upward else timesteps
    for step in zip(range(1, steps + 1), timesteps, torch.tensor(timesteps).to(latents.device), strict=True):
        yield step
        pace.keep()


@torch.no_grad()
def invert(
    predict: Predict, latents: Tensor, text: Text, schedule: Schedule, steps: int, *, on_step: OnStep = lambda _: None
) -> Tensor:
    """The noise that unguided DDIM sampling would turn into `latents`.

    latents (b,c,f,h,w), text as `predict` takes it → (b,c,f,h,w). The noise is predicted at the *next* timestep from
    the present latents, as the reference does.
    """
    for number, timestep, on_device in each_timestep(schedule, latents, steps, upward=True):
        predicted = predict(latents, on_device, text)
        before = schedule.alpha_before(timestep, steps)
        clean, noise = clean_and_noise(latents, predicted, before, schedule.prediction_type)
        latents = noised(clean, noise, schedule.alpha(timestep))
        on_step(Step("invert", number, steps, latents, clean))
    return latents


@torch.no_grad()
def sample(
    predict: Predict,
    latents: Tensor,
    text: Text,
    schedule: Schedule,
    steps: int,
    *,
    unconditional: Text | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: int = 1,
    solver: Solver | None = None,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    blend: Blend | None = None,
    on_step: OnStep = lambda _: None,
) -> Tensor:
    """DDIM sampling from `latents`, guided where `unconditional` text is given (one call with both batches).

    latents (b,c,f,h,w), text and unconditional as `predict` takes them → (b,c,f,h,w). `guidance_interval` is that of
    `Guided`; a `solver` takes the place of DDIM's own step, and of `eta`. The noise of `eta` is one draw for all of the
    batch, so that each sample is what it would be alone; it is drawn on the processor, the same for every device, and
    is the only thing that a step copies there. What a `blend` is given after the last step counts as clean, ᾱ = 1.
    Raises InputError for texts of two kinds.
    """
    if unconditional is not None and guidance_scale != 1.0:
        predict = Guided(predict, unconditional, guidance_scale, guidance_interval, steps)
    for number, timestep, on_device in each_timestep(schedule, latents, steps, upward=False):
        predicted = predict(latents, on_device, text)
        alpha, after = schedule.alpha(timestep), schedule.alpha_before(timestep, steps)
        clean, noise = clean_and_noise(latents, predicted, alpha, schedule.prediction_type)
        if solver is not None:
            latents = solver(Known(alpha, latents, clean, noise), after)
        elif eta > 0:
            fresh = torch.randn(latents[:1].shape, generator=generator, dtype=latents.dtype).to(latents.device)
            latents = stochastically_noised(clean, noise, fresh, alpha, after, eta)
        else:
            latents = noised(clean, noise, after)
        if blend is not None:
            latents, clean = blend(latents, after if number < steps else 1.0), blend(clean, 1.0)
        on_step(Step("sample", number, steps, latents, clean))
    return latents
