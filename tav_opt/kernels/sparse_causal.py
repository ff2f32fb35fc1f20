"""Sparse first-and-previous-frame attention as torch ops: the Triton kernels on CUDA, its naive twin elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tav_opt.kernels import flash_backward, naive
from tav_opt.kernels.inputs import check, on_kernel
from tav_opt.kernels.op import Gradients, register, register_backward


def sparse_causal_attention(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """Attention of frame i to frames 0 and i-1, of frame 0 to itself (Tune-A-Video equation 4).

    q, k, v are (b f) n c with any strides but a contiguous last dimension; the result is (b f) n c, contiguous.
    Traced as the one op `tav_opt::sparse_causal_attention`. Raises InputError for shapes that do not fit.
    """
    if torch.is_grad_enabled() and not on_kernel(q) and not torch.compiler.is_compiling():
        # Tuning on a CPU: the twin's own graph spares the op's backward a third forward pass.
        return naive.sparse_causal_attention(q, k, v, frames, heads)
    tuned = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if tuned and on_kernel(q) and not torch.compiler.is_exporting():
        return torch.ops.tav_opt.sparse_causal_attention_with_lse(q, k, v, frames, heads)[0]
    return torch.ops.tav_opt.sparse_causal_attention(q, k, v, frames, heads)


def _launch(*inputs: Any, **options: Any) -> Tensor:
    from tav_opt.kernels.sparse_causal_kernel import launch  # Triton is imported where it runs, and not before

    return launch(*inputs, **options)


@torch.library.custom_op("tav_opt::sparse_causal_attention_with_lse", mutates_args=())
def _with_lse(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> tuple[Tensor, Tensor]:
    """The result, and what its backward needs: the log-sum-exp of each query's scores, float32 (b f) heads n."""
    from tav_opt.kernels.sparse_causal_kernel import launch_with_lse

    check(q, k, v, frames, heads)
    with torch.cuda.device_of(q):
        return launch_with_lse(q, k, v, frames, heads)


@_with_lse.register_fake
def _(q: Tensor, _k: Tensor, _v: Tensor, _frames: int, heads: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], heads, q.shape[1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.frames, ctx.heads = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _gradients_of_kept(ctx: Any, grad: Tensor, _of_lse: Tensor) -> tuple[Tensor | None, ...]:
    backward = torch.ops.tav_opt.sparse_causal_attention_backward
    return *backward(grad, *ctx.saved_tensors, ctx.frames, ctx.heads), None, None


def _run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, frames: int, heads: int
) -> Gradients:
    from tav_opt.kernels.sparse_causal_backward import launch
    from tav_opt.kernels.tiles import architecture, backward_of

    with torch.cuda.device_of(q):
        if flash_backward.fits(q, heads) and backward_of(architecture(q)) == "flash":
            return flash_backward.gradients(grad, q, k, v, out, lse, frames, heads)
        return launch(grad, q, k, v, out, lse, frames, heads)


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Gradients:
    """Of the op without log-sum-exp, whose forward runs again: whoever calls that op itself under gradients."""
    out, lse = torch.ops.tav_opt.sparse_causal_attention_with_lse(q, k, v, frames, heads)
    return torch.ops.tav_opt.sparse_causal_attention_backward(grad, q, k, v, out, lse, frames, heads)


_with_lse.register_autograd(_gradients_of_kept, setup_context=_keep)
register_backward("sparse_causal_attention_backward", _run_backward)
register("sparse_causal_attention", naive.sparse_causal_attention, _launch, lambda _q, _frames: True, _backward)
