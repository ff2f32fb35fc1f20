"""One optimisation step of tuning, and all that the next one depends on (paper section 3.2, equation 2)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tav_opt.config import InputError, OptimiserConfig, TrainConfig
from tav_opt.ddim import Schedule
from tav_opt.unet import VideoUNet, trained_names
from tav_opt.windows import cut

Frozen: TypeAlias = VideoUNet | UNet2DConditionModel
"""A UNet of whose weights some train."""
Draw = Callable[[int, int], tuple[Tensor, Tensor]]
"""`draw(step, micro_step) -> noise (b,c,f,h,w), timesteps (b,)`: always the same for the same numbers."""

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class Training:
    """All that the next step depends on; `resume` keeps it on disk."""

    trained: dict[str, nn.Parameter]
    """fp32 masters by name: the UNet's own parameters, or what stands beside them where those are halves."""
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    losses: list[float]
    halves: dict[str, nn.Parameter] = field(default_factory=dict)
    """The UNet's own parameters by name where it computes in half precision: copies of the masters."""

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The UNet's own parameters that train, by name."""
        return self.halves or self.trained

    def gather(self) -> None:
        """Adds the halves' gradients to those of their masters, in float32, and drops them."""
        for name, half in self.halves.items():
            if half.grad is None:
                continue
            gradient, half.grad = half.grad.float(), None
            master = self.trained[name]
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def spread(self) -> None:
        """Copies the masters into their halves."""
        for name, half in self.halves.items():
            half.data.copy_(self.trained[name].data)


def begin(unet: VideoUNet, config: TrainConfig) -> Training:
    """Makes the UNet trainable in place, in the dtype that it is to compute in; all but the chosen parameters frozen.

    In half precision float32 masters of those train beside it (Micikevicius et al., Mixed Precision Training, 2018).
    """
    dtype = compute_dtype(unet, config)
    unet.requires_grad_(False)
    own = dict(unet.named_parameters())
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return begin_with({name: own[name] for name in trained_names(unet, config.trainable)}, unet, dtype, config)


def begin_with(
    chosen: dict[str, nn.Parameter], module: nn.Module, dtype: torch.dtype, config: OptimiserConfig
) -> Training:
    """Training of these parameters of a module, which is to compute in a dtype: in half precision beside masters."""
    halves = {} if dtype == torch.float32 else chosen
    trained = {name: nn.Parameter(half.data.float()) for name, half in halves.items()} or chosen
    module.to(dtype)  # after the masters have been taken
    for parameter in chosen.values():
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, eps=config.eps, fused=True
    )
    scaler = torch.amp.GradScaler(next(iter(chosen.values())).device.type, enabled=dtype == torch.float16)
    return Training(trained, optimizer, scaler, [], halves)


def train_step(
    training: Training,
    unet: VideoUNet,
    latents: Tensor,
    text: Tensor,
    schedule: Schedule,
    config: TrainConfig,
    draw: Draw,
) -> float:
    """One optimiser step over `config.accumulation` draws of noise → their mean loss, also added to `training.losses`.

    latents (b,c,f,h,w), text (b,tokens,width); with `config.window` of each draw another window of the latents. Raises
    InputError when the loss is no number.
    """

    def loss(micro: int) -> Tensor:
        shown = latents
        if config.window is not None:
            begin = window_begin(config.seed, training.step, micro, latents.shape[2] - config.window)
            shown = cut(latents, begin, config.window)
        return denoising_loss(unet, shown, text, schedule, *draw(training.step, micro))

    return optimise(training, config, loss)


def optimise(training: Training, config: OptimiserConfig, loss_of: Callable[[int], Tensor]) -> float:
    """One optimiser step over the losses of `config.accumulation` micro-steps → their mean, also kept.

    Raises InputError when the loss is no number.
    """
    for group in training.optimizer.param_groups:
        group["lr"] = config.lr * lr_factor(config, training.step)
    total = 0.0
    for micro in range(config.accumulation):
        loss = loss_of(micro) / config.accumulation
        training.scaler.scale(loss).backward()
        training.gather()
        total += loss.item()
    if not math.isfinite(total):
        raise InputError(f"loss became {total} at step {training.step + 1}: lower the learning rate ({config.lr})")
    training.scaler.unscale_(training.optimizer)
    nn.utils.clip_grad_norm_(training.trained.values(), config.clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.spread()
    training.optimizer.zero_grad()
    training.losses.append(total)
    return total


def denoising_loss(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    latents: Tensor,
    text: Tensor,
    schedule: Schedule,
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Mean squared error of the predicted noise, or v (paper equation 2; Salimans & Ho 2022).

    Of clips (b,c,f,h,w) or pictures (b,c,h,w), as the UNet takes them.
    """
    alphas = torch.tensor(schedule.alphas_cumprod, device=latents.device)[timesteps]
    a, s = (x.view(-1, *[1] * (latents.ndim - 1)) for x in (alphas**0.5, (1 - alphas) ** 0.5))
    target = noise if schedule.prediction_type == "epsilon" else a * noise - s * latents
    return F.mse_loss(unet(a * latents + s * noise, timesteps, text).float(), target)


def window_begin(seed: int, step: int, micro: int, last: int) -> int:
    """Where a draw's window begins, 0…last, each as likely: from (seed, step, micro-step) alone."""
    return int(torch.randint(last + 1, (), generator=_generator(f"window {seed} {step} {micro}")))


def _generator(told: str) -> torch.Generator:
    digest = hashlib.sha256(told.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def seeded_draw(seed: int, latents: Tensor, schedule: Schedule) -> Draw:
    """Noise and timesteps from (seed, step, micro-step) alone, the same on every device."""

    def draw(step: int, micro: int) -> tuple[Tensor, Tensor]:
        generator = _generator(f"{seed} {step} {micro}")
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(len(schedule.alphas_cumprod), (latents.shape[0],), generator=generator)
        return noise.to(latents.device), timesteps.to(latents.device)

    return draw


def lr_factor(config: OptimiserConfig, step: int) -> float:
    """The part of the learning rate that holds at a step (from 0): warm-up, then constant, linear or cosine decay."""
    if step < config.warmup:
        return step / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1 - done)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def compute_dtype(unet: Frozen, config: OptimiserConfig) -> torch.dtype:
    """What the UNet computes in while it is tuned: the half precision that is asked for, else its own dtype."""
    return _HALF.get(config.autocast, unet.conv_in.weight.dtype)


def state_of(training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a run as tensors and a dictionary for JSON."""
    tensors = {"losses": torch.tensor(training.losses, dtype=torch.float64)}
    for name, parameter in training.trained.items():
        tensors[f"master.{name}"] = parameter.detach().contiguous()  # in memory a convolution's channels come last
        for moment, value in training.optimizer.state[parameter].items():
            tensors[f"{moment}.{name}"] = value.contiguous()
    return tensors, {"scaler": training.scaler.state_dict()}


def restore(training: Training, tensors: dict[str, Tensor], extra: dict[str, Any]) -> None:
    """Puts a saved state into a training that has just begun; raises InputError where it is another model's."""
    # While the loss's scale has not found its place no step changes anything, and there are no moments yet.
    begun = not extra["scaler"] or any(
        f"{moment}.{name}" in tensors for moment in _MOMENTS for name in training.trained
    )
    moments = _MOMENTS if begun else ()
    shapes = {"losses": None} | {
        f"{part}.{name}": parameter.shape if part != "step" else torch.Size()
        for name, parameter in training.trained.items()
        for part in ("master", *moments)
    }
    for name, shape in shapes.items():
        if name not in tensors or shape not in (None, tensors[name].shape):
            raise InputError(f"the state of the run is not this model's, or is broken: {name} is missing or another")
    training.losses[:] = tensors["losses"].tolist()
    training.scaler.load_state_dict(extra["scaler"])
    for name, parameter in training.trained.items():
        parameter.data.copy_(tensors[f"master.{name}"])
        if moments:
            # Copied: what lies in the file is neither laid out nor aligned as parameters are; sums may depend on that.
            training.optimizer.state[parameter] = {
                moment: _like(parameter, moment).copy_(tensors[f"{moment}.{name}"]) for moment in moments
            }
    training.spread()


def _like(parameter: nn.Parameter, moment: str) -> Tensor:
    """Room for one of AdamW's moments, or for the count of its steps."""
    return torch.empty((), device=parameter.device) if moment == "step" else torch.empty_like(parameter.data)
