"""What networks that follow maps need in memory in eager PyTorch, beside the edit that follows them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tav_opt.conditions.controlnet import ControlNetFrames
from tav_opt.conditions.framewise import AT_ONCE

_AT_MAPS_SIZE = 3
"""Tensors of a ControlNet's first width that live at once at the maps' size: a convolution's two, and what follows."""
_OF_RESIDUALS = 2
"""Copies of what is added that live at once: as the network gives it, and scaled, which alone the UNet has then."""


def network_bytes(frames_of: nn.Module, frames: int, height: int, width: int, factor: int, rows: int) -> int:
    """Bytes of one network's weights, of what it adds to `rows` of so many frames, and of what it works in.

    Frames are of height × width pixels, `factor` times the latents'. What it works in once it has seen the maps is less
    than the UNet does, whose turn is another.
    """
    weights = sum(p.numel() * p.element_size() for p in frames_of.parameters())
    size = next(frames_of.parameters()).element_size()
    maps, first, hint = torch.empty(1, 3, height, width, device="meta"), 0, 0
    if isinstance(frames_of, ControlNetFrames):
        config = frames_of.net.config
        (seen,) = _shapes(frames_of.hint, maps=maps)
        made = _shapes(
            frames_of,
            latents=torch.empty(1, config.in_channels, height // factor, width // factor, device="meta"),
            timestep=torch.zeros(1, dtype=torch.int64, device="meta"),
            text=torch.empty(1, 1, config.cross_attention_dim, device="meta"),
            hint=torch.empty(seen, device="meta"),
        )
        first = config.conditioning_embedding_out_channels[0]
        hint = (1 + rows) * frames * math.prod(seen)  # from step to step, and for each row
    else:
        made = _shapes(frames_of, maps=maps)
    added = rows * frames * sum(map(math.prod, made))
    seeing = min(AT_ONCE, frames) * height * width * (3 + _AT_MAPS_SIZE * first)
    return weights + size * (_OF_RESIDUALS * added + hint + seeing)


@torch.no_grad()
def _shapes(module: nn.Module, **given: Tensor) -> list[torch.Size]:
    """Of what a module makes of one frame, from a run on no device."""
    state = {name: x.to("meta") for name, x in (*module.named_parameters(), *module.named_buffers())}
    return [one.shape for one in torch.func.functional_call(module, state, (), given)]
