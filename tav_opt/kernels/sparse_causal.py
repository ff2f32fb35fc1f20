"""Sparse first-and-previous-frame attention as a torch op: the Triton kernel on CUDA, its naive twin elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tav_opt.kernels import naive
from tav_opt.kernels.inputs import on_kernel
from tav_opt.kernels.op import register


def _launch(*inputs: Any, **options: Any) -> Tensor:
    from tav_opt.kernels.sparse_causal_kernel import launch  # Triton is imported where it runs, and not before

    return launch(*inputs, **options)


register("sparse_causal_attention", naive.sparse_causal_attention, _launch, lambda _q, _frames: True)


def sparse_causal_attention(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """Attention of frame i to frames 0 and i-1, of frame 0 to itself (Tune-A-Video equation 4).

    q, k, v are (b f) n c with any strides but a contiguous last dimension; the result is (b f) n c, contiguous.
    Traced as the one op `tav_opt::sparse_causal_attention`. Raises InputError for shapes that do not fit.
    """
    if torch.is_grad_enabled() and not on_kernel(q) and not torch.compiler.is_compiling():
        # Tuning on a CPU: the twin's own graph spares the op's backward a third forward pass.
        return naive.sparse_causal_attention(q, k, v, frames, heads)
    return torch.ops.tav_opt.sparse_causal_attention(q, k, v, frames, heads)
