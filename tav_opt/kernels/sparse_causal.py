"""Sparse first-and-previous-frame attention as a torch op: the Triton kernel on CUDA, its naive twin elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from tav_opt.kernels import reference
from tav_opt.kernels.layout import check, on_kernel


@torch.library.custom_op("tav_opt::sparse_causal_attention", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    check(q, k, v, frames, heads)
    if on_kernel(q):
        from tav_opt.kernels.sparse_causal_kernel import launch

        return launch(q, k, v, frames, heads)
    return reference.sparse_causal_attention(q, k, v, frames, heads).contiguous()


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
        out = reference.sparse_causal_attention(q, k, v, ctx.frames, ctx.heads)
    return *torch.autograd.grad(out, (q, k, v), grad), None, None


_op.register_autograd(_backward, setup_context=_keep_inputs)


def sparse_causal_attention(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """Attention of frame i to frames 0 and i-1, of frame 0 to itself (Tune-A-Video equation 4).

    q, k, v are (b f) n c with any strides but a contiguous last dimension; the result is (b f) n c, contiguous.
    Traced as the one op `tav_opt::sparse_causal_attention`. Raises InputError for shapes that do not fit.
    """
    if torch.is_grad_enabled() and not on_kernel(q) and not torch.compiler.is_compiling():
        # Tuning on a CPU: the twin's own graph spares the op's backward a third forward pass.
        return reference.sparse_causal_attention(q, k, v, frames, heads)
    return torch.ops.tav_opt.sparse_causal_attention(q, k, v, frames, heads)
