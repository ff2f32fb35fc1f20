"""The image model on video: every frame by itself, and Plug-and-Play (Tumanyan et al. 2023, arXiv 2211.12572).

The paper compares with the second (section 4.2); the first is what a video model has to beat.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tav_opt import ddim
from tav_opt.ddim import Timestep, timestep_rows
from tav_opt.models import StableDiffusion

FEATURES = 0.8
"""Part of the steps, from the noisy end, in which the source's features are injected."""
ATTENTION = 0.5
"""Part of the steps in which its self-attention is (both: section 5 of Tumanyan et al., and their code)."""


@torch.no_grad()
def predict_frames(sd: StableDiffusion, latents: Tensor, timestep: Timestep, text: Tensor) -> Tensor:
    """The image UNet on every frame by itself: latents (b,c,f,h,w), text (b,tokens,width) → noise or v (b,c,f,h,w)."""
    b, c, f, h, w = latents.shape
    images = latents.transpose(1, 2).reshape(b * f, c, h, w)
    rows = timestep_rows(timestep, latents).repeat_interleave(f, 0)
    unet: Any = sd.unet  # diffusers' own, of models.load_image
    noise = unet(images, rows, text.repeat_interleave(f, 0), return_dict=False)[0]
    return noise.reshape(b, f, -1, h, w).transpose(1, 2)


def invert_frames(sd: StableDiffusion, latents: Tensor, empty: Tensor, steps: int, on_step: ddim.OnStep) -> Tensor:
    """DDIM inversion of every frame by the image model: latents (1,c,f,h,w) → all that it passes (steps,c,f,h,w).

    The last is the noisiest; `empty` (1,tokens,width) is the empty prompt's text.
    """
    passed: list[Tensor] = []

    def keep(step: ddim.Step) -> None:
        passed.append(step.latents[0])
        on_step(step)

    ddim.invert(lambda *given: predict_frames(sd, *given), latents, empty, sd.schedule, steps, on_step=keep)
    return torch.stack(passed)


class PlugAndPlay:
    """`predict` whose sampled rows have the source's decoder features and self-attention.

    The source is a row of its own in every call, at its own latents of the inversion and the empty prompt, so that its
    features need not be kept (some 200 GB for 24 frames of 512×512).
    """

    def __init__(self, sd: StableDiffusion, passed: Tensor, empty: Tensor, steps: int) -> None:
        self._sd, self._empty, self._steps = sd, empty, steps
        self._source = dict(zip(sd.schedule.timesteps(steps)[::-1], passed, strict=True))
        self._injection = _Injection()
        self._done = 0

    def __call__(self, latents: Tensor, timestep: Timestep, text: Tensor) -> Tensor:
        """latents (b,c,f,h,w), text (b,tokens,width) → noise or v (b,c,f,h,w); called once a step."""
        source = self._source[int(timestep)][None].to(latents)
        self._injection.rows = latents.shape[0] + 1
        self._injection.features = self._done < FEATURES * self._steps
        self._injection.attention = self._done < ATTENTION * self._steps
        self._done += 1
        given = torch.cat([source, latents]), timestep, torch.cat([self._empty, text])
        return predict_frames(self._sd, *given)[1:]

    @contextmanager
    def installed(self) -> Iterator[PlugAndPlay]:
        """For the block, the UNet's decoder injects; afterwards it is as it was."""
        unet: Any = self._sd.unet
        blocks = [module for block in unet.up_blocks for module in _self_attentions(block)][1:]
        before = [attention.processor for attention in blocks]
        hook = unet.up_blocks[1].resnets[1].conv2.register_forward_hook(self._injection.of_features)
        for attention in blocks:
            attention.set_processor(_Injecting(self._injection))
        try:
            yield self
        finally:
            hook.remove()
            for attention, processor in zip(blocks, before, strict=True):
                attention.set_processor(processor)


def _self_attentions(block: nn.Module) -> Iterator[Attention]:
    for name, module in block.named_modules():
        if name.endswith(".attn1") and isinstance(module, Attention):
            yield module


@dataclass
class _Injection:
    """What is injected in the present step."""

    rows: int = 1
    """Of the batch, the source's first."""
    features: bool = False
    attention: bool = False

    def of_features(self, _module: nn.Module, _given: Any, made: Tensor) -> Tensor | None:
        """The source's features in all rows, before the shortcut is added: (rows f) c h w; None: as they are."""
        return self.spread(made) if self.features else None

    def spread(self, x: Tensor) -> Tensor:
        """The source's part in the place of every row's: (rows f) …"""
        return x[: len(x) // self.rows].repeat(self.rows, *[1] * (x.dim() - 1))


class _Injecting:
    """Self-attention by the source's queries and keys on each row's own values."""

    def __init__(self, injection: _Injection) -> None:
        self._injection = injection

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if self._injection.attention:
            q, k = self._injection.spread(q), self._injection.spread(k)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))  # (rows f) heads n d
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        projection, dropout = attn.to_out
        return dropout(projection(mixed))
