"""Attention over the frames at each pixel: the Triton kernel as a torch op on CUDA, its naive twin elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from tav_opt.kernels import reference
from tav_opt.kernels.layout import check, on_kernel


def fits(x: Tensor, frames: int) -> bool:
    """Whether all frames of a pixel are one tile of the kernel: 128 in half precision, 32 in float32."""
    return frames <= (128 if x.element_size() == 2 else 32)


@torch.library.custom_op("tav_opt::temporal_attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    check(q, k, v, frames, heads)
    if on_kernel(q) and fits(q, frames):
        from tav_opt.kernels.temporal_kernel import launch

        return launch(q, k, v, frames, heads)
    return reference.temporal_attention(q, k, v, frames, heads).contiguous()


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    return q.new_empty(q.shape)


def _keep_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.frames, ctx.heads = inputs
    ctx.save_for_backward(q, k, v)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """Through the naive twin, computed again."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        out = reference.temporal_attention(q, k, v, ctx.frames, ctx.heads)
    return *torch.autograd.grad(out, (q, k, v), grad), None, None


_op.register_autograd(_backward, setup_context=_keep_inputs)


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """Every pixel attends over all frames, unmasked, without positions (Tune-A-Video section 3.2).

    q, k, v are (b f) n c with any strides but a contiguous last dimension; the result is (b f) n c. Off CUDA, and for
    more frames than fit the kernel, it is standard operators, which every exporter knows.
    """
    if on_kernel(q) and fits(q, frames):
        return torch.ops.tav_opt.temporal_attention(q, k, v, frames, heads)
    return reference.temporal_attention(q, k, v, frames, heads)
