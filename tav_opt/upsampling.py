"""Nearest-neighbour upsampling and its 3×3 convolution as one transposed convolution: 16 products where it had 36."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class FusedUpsample(Upsample2D):
    """diffusers' upsampling by two, whatever the batch; its parameters are those of the convolution, as they were.

    diffusers looks at the size of the batch here, for a kernel that large ones once broke; an exported graph would hold
    for batches on one side of that size only.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
        """hidden_states (b f) c h w → (b f) c' 2h 2w, or c' of `output_size` (h', w')."""
        h, w = hidden_states.shape[-2:]
        if self.is_transposed() and (output_size is None or tuple(output_size) == (2 * h, 2 * w)):
            weight = _doubled(_doubled(self.conv.weight, 2), 3).transpose(0, 1)
            return F.conv_transpose2d(hidden_states, weight, self.conv.bias, stride=2, padding=1)
        scale = 2.0 if output_size is None else None
        return self.conv(F.interpolate(hidden_states, size=output_size, scale_factor=scale, mode="nearest"))

    def is_transposed(self) -> bool:
        """Whether both are one; not where a layer, a LoRA's say, stands around the convolution and is to be called."""
        conv = self.conv
        return type(conv) is nn.Conv2d and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))


def _doubled(weight: Tensor, axis: int) -> Tensor:
    """The 3 weights of an axis on values that stand there twice → the 4 that each value once has in all."""
    first, middle, last = weight.unbind(axis)
    return torch.stack([last, middle + last, first + middle, first], axis)


def fuse(network: nn.Module) -> None:
    """Swaps the upsampling of a network, where a convolution follows it, in place."""
    for module in network.modules():
        if type(module) is Upsample2D and isinstance(getattr(module, "conv", None), nn.Conv2d):
            module.__class__ = FusedUpsample
