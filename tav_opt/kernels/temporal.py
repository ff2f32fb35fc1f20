"""Attention over the frames at each pixel: the Triton kernel as a torch op on CUDA, its naive twin elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tav_opt.kernels import naive
from tav_opt.kernels.inputs import on_kernel, temporal_backward_rows
from tav_opt.kernels.op import Gradients, register, register_backward, through


def fits(x: Tensor, frames: int) -> bool:
    """Whether all frames of a pixel are one tile of the kernel: 128 in half precision, 32 in float32."""
    return frames <= (128 if x.element_size() == 2 else 32)


def backward_fits(x: Tensor, frames: int, heads: int) -> bool:
    """Whether both directions of a tile of all frames stay in registers: 8192 values in half precision, or 2048."""
    rows = temporal_backward_rows(frames, x.element_size())
    return rows <= 64 and rows * (x.shape[2] // heads) <= (8192 if x.element_size() == 2 else 2048)


def _launch(*inputs: Any, **options: Any) -> Tensor:
    from tav_opt.kernels.temporal_kernel import launch  # Triton is imported where it runs, and not before

    return launch(*inputs, **options)


def _run_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Gradients:
    from tav_opt.kernels.temporal_backward import launch

    with torch.cuda.device_of(q):
        return launch(grad, q, k, v, frames, heads)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Gradients:
    if not backward_fits(q, frames, heads):
        return through(naive.temporal_attention, grad, q, k, v, frames, heads)
    return torch.ops.tav_opt.temporal_attention_backward(grad, q, k, v, frames, heads)


register_backward("temporal_attention_backward", _run_backward)
register("temporal_attention", naive.temporal_attention, _launch, fits, _backward)


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """Every pixel attends over all frames, unmasked, without positions (Tune-A-Video section 3.2).

    q, k, v are (b f) n c with any strides but a contiguous last dimension; the result is (b f) n c. Off CUDA, and for
    more frames than fit the kernel, it is standard operators, which every exporter knows.
    """
    if on_kernel(q) and fits(q, frames):
        return torch.ops.tav_opt.temporal_attention(q, k, v, frames, heads)
    return naive.temporal_attention(q, k, v, frames, heads)
