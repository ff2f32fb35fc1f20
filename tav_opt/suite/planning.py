"""What a suite will take, before anything of it is done: units, hours and GiB, by counting and never by measuring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers import Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from tav_opt.base import weights
from tav_opt.base.directory import Base
from tav_opt.config import CLIP, ClipConfig, InputError, MetricsConfig, TrainConfig
from tav_opt.memory import eager, outline
from tav_opt.suite.suite_types import Method, Suite
from tav_opt.suite.units import KINDS, Place, Unit
from tav_opt.unet import trained_names

BACKWARD = 2
"""Floating-point operations of a backward pass to one of a forward pass; again one where activations are computed
twice."""
MACHINES = (1, 8, 64)
CLIP_GIB, PICK_SCORE_GIB, DINO_GIB = 1.6, 3.7, 0.32
"""In float32, of CLIP ViT-L/14, PickScore's ViT-H/14 and DINO's ViT-B/8 (428, 986 and 86 million values)."""
_SIZES: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "scheduler": {},
}
_SD1 = Base(path=Path(), folder=Path(), configs=_SIZES)
"""The sizes of Stable Diffusion 1.x, for a model that is not here."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What units of one kind take, all together."""

    units: int
    flop: float
    """Floating-point operations."""
    gib: float
    """Memory of the one that takes most, its model included; tuning's with gradient checkpointing unless it is told."""
    disk_gib: float
    """Written and kept."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a suite will take."""

    model: str
    """Whose sizes were counted."""
    needs: dict[str, Need]
    """By kind."""
    networks_gib: float
    """Memory of the networks that measure, which a worker keeps beside the model in hand."""

    @property
    def gib(self) -> float:
        """Memory that a worker needs: it does units of all kinds."""
        models = (need.gib for kind, need in self.needs.items() if kind != "measure")
        return self.networks_gib + max(models, default=0.0)

    @property
    def disk_gib(self) -> float:
        """All that is kept."""
        return sum(need.disk_gib for need in self.needs.values())

    @property
    def flop(self) -> float:
        """Of all units."""
        return sum(need.flop for need in self.needs.values())

    def hours(self, machines: int, teraflops: float) -> float:
        """At a rate that is assumed, never measured; kind after kind, each in as many turns as it has units a GPU."""
        turns = sum(math.ceil(need.units / machines) * need.flop / need.units for need in self.needs.values())
        return turns / (teraflops * 1e12) / 3600


def plan_of(suite: Suite, planned: Sequence[Unit], place: Place) -> Plan:
    """Counts what units will take by the model's shapes; of a model that is not here, by Stable Diffusion 1.x's.

    Floating-point operations are those of the UNet's and the VAE's convolutions, products and attentions; reading,
    measuring and writing count as none.
    """
    try:
        base, model = Base.at(suite.model), str(suite.model)
    except InputError:
        base, model = _SD1, f"Stable Diffusion 1.x, since {suite.model} is not here"
    shapes = _Shapes(base, getattr(torch, place.dtype))
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in KINDS}
    for unit in planned:
        found[unit.kind].append(shapes.taken(unit))
    networks = _networks_gib(suite.metrics) if found["measure"] else 0.0
    needs = {
        kind: Need(
            units=len(taken),
            flop=sum(flop for flop, _, _ in taken),
            gib=max(gib for _, gib, _ in taken) + (networks if kind == "measure" else 0.0),
            disk_gib=sum(disk for _, _, disk in taken),
        )
        for kind, taken in found.items()
        if taken
    }
    return Plan(model=model, needs=needs, networks_gib=networks)


def _networks_gib(config: MetricsConfig) -> float:
    """By the files of their weights, which are loaded in float32; of a network that is not here, the usual one's."""
    usual = {"clip": CLIP_GIB, "pick_score": PICK_SCORE_GIB, "dino": DINO_GIB}
    asked = {name: getattr(config, name) for name in usual}
    asked["clip"] = asked["clip"] or CLIP
    return sum(_network_gib(path, usual[name]) for name, path in asked.items() if path is not None)


def _network_gib(path: str, usual: float) -> float:
    folder = Path(path).expanduser()
    return sum(file.stat().st_size for file in weights.files(folder)) / 2**30 if folder.is_dir() else usual


class _Shapes:
    """A model without values, whose parts are counted once for each size of clips."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self._sd = outline.of(base, dtype)
        self._counted = outline.of(base)  # the counter's shapes; bytes are of the first's dtype
        self._step, self._vae_frame = cache(self._step_flop), cache(self._vae_frame_flop)
        self._taken: dict[tuple[Any, ...], tuple[float, float, float]] = {}

    def taken(self, unit: Unit) -> tuple[float, float, float]:
        """Operations, GiB in memory and GiB on disk of a unit."""
        clip, method = unit.video.clip, unit.method
        alike = unit.kind, method and method.name, clip.frames, clip.height, clip.width
        if alike not in self._taken:
            self._taken[alike] = self._count(unit, clip, method)
        return self._taken[alike]

    def _count(self, unit: Unit, clip: ClipConfig, method: Method | None) -> tuple[float, float, float]:
        frames = clip.frames * clip.height * clip.width * 3 / 2**30
        if unit.kind == "source":
            return 0.0, 2 * frames, 1.1 * frames  # and a video of them
        if unit.kind == "measure" or method is None or method.kind == "folder":
            return 0.0, 2 * frames, 0.05 * frames
        step, vae = self._step(clip.frames, clip.height, clip.width), self._vae_flop(clip)
        sizes = clip.frames, clip.height, clip.width
        latents = clip.frames * clip.height * clip.width * 4 * 4 / self._sd.vae_factor**2 / 2**30
        if unit.kind == "tune":
            times = 1 + BACKWARD + bool(method.tune.gradient_checkpointing)  # undecided: off, where there is room
            flop = step * (times * method.tune.steps * method.tune.accumulation + method.tune.inversion_steps) + vae
            values = self._values(method)
            return flop, eager.estimate_tuning(self._sd, _thrifty(method.tune), *sizes) / 2**30, values + 2 * latents
        editing = eager.estimate_editing(self._sd, *sizes) / 2**30
        if unit.kind == "invert":
            return step * method.edit.steps + vae, editing, latents * method.edit.steps
        rows = 3 if method.kind == "plug-and-play" else 2
        return rows * step * method.edit.steps + vae, editing * rows / 2, 0.05 * frames

    def _values(self, method: Method) -> float:
        """GiB of a clip's own values, in float16."""
        own = dict(self._sd.unet.named_parameters())
        return sum(own[name].numel() for name in trained_names(self._sd.unet, method.tune.trainable)) * 2 / 2**30

    def _step_flop(self, frames: int, height: int, width: int) -> float:
        """Of one call of the UNet for one clip."""
        unet, factor = self._counted.unet, self._counted.vae_factor
        latents = torch.empty(1, int(unet.config.in_channels), frames, height // factor, width // factor, device="meta")
        text = torch.empty(1, 77, int(unet.config.cross_attention_dim), device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(latents, torch.zeros(1, dtype=torch.int64, device="meta"), text)
        return counter.get_total_flops() + self._attention_flop(frames, latents.shape[3] * latents.shape[4])

    def _attention_flop(self, frames: int, pixels: int) -> float:
        """Queries by keys, and weights by values: 2 × 2 operations for each pair and channel; the counter sees none."""
        unet, total = self._sd.unet, 0.0
        levels = len(unet.down_blocks)
        depths = [*enumerate(unet.down_blocks), (levels - 1, unet.mid_block)]
        depths += [(levels - 1 - depth, block) for depth, block in enumerate(unet.up_blocks)]
        for depth, block in depths:
            n = pixels // 4**depth
            for module in block.modules():
                if isinstance(module, Transformer2DModel):
                    pairs = frames * n * (2 * n + 77 + frames)  # sparse-causal, text, temporal
                    total += 4.0 * pairs * module.in_channels * len(module.transformer_blocks)
        return total

    def _vae_flop(self, clip: ClipConfig) -> float:
        """Of encoding, or decoding, a clip."""
        return clip.frames * self._vae_frame(clip.height, clip.width)

    def _vae_frame_flop(self, height: int, width: int) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self._counted.vae.encode(torch.empty(1, 3, height, width, device="meta"))
        return float(counter.get_total_flops())


def _thrifty(tune: TrainConfig) -> TrainConfig:
    """As tuning can do with: it checkpoints by itself where no more is free (memory.eager.fit_tuning)."""
    return replace(tune, gradient_checkpointing=True) if tune.gradient_checkpointing is None else tune


def table(plan: Plan, teraflops: float) -> str:
    """The plan in words and numbers, what is assumed said first."""
    lines = [
        f"ESTIMATE, not a measurement: the shapes of {plan.model}, counted; hours are the counted operations at an "
        f"assumed {teraflops:g} TFLOP/s a GPU, which no GPU has shown (--teraflops)",
        "",
        f"{'units':10}{'count':>7}{'PFLOP':>12}{'GiB memory':>12}{'GiB disk':>10}",
    ]
    for kind, need in plan.needs.items():
        lines.append(f"{kind:10}{need.units:7}{need.flop / 1e15:12.2f}{need.gib:12.2f}{need.disk_gib:10.2f}")
    total = sum(need.units for need in plan.needs.values())
    lines.append(f"{'all':10}{total:7}{plan.flop / 1e15:12.2f}{plan.gib:12.2f}{plan.disk_gib:10.2f}")
    lines += ["", f"A worker keeps the {plan.networks_gib:.2f} GiB of the networks that measure beside its model."]
    if "tune" in plan.needs:
        lines.append(
            "Unless it is told, tuning's memory is with gradient checkpointing, its operations are without, "
            "which it does where so much is free."
        )
    lines += ["", *(f"{n:2} GPU{'s' * (n > 1)}: {_hours(plan.hours(n, teraflops))}" for n in MACHINES)]
    return "\n".join(lines)


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{max(1, math.ceil(hours * 60))} min"
