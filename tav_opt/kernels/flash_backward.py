"""The backward of sparse-causal attention as two calls of PyTorch's flash backward: frame 0's keys, frame i-1's keys.

A softmax over the keys of two frames is the merger of the two frames' own. Each call is given the merged result and
log-sum-exp in place of its own, and so computes its share of the merged gradients: nothing is concatenated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tav_opt.kernels.naive import split_heads

Gradients = tuple[Tensor, Tensor, Tensor]


def fits(q: Tensor, heads: int) -> bool:
    """Whether PyTorch's kernel for CUDA takes these tensors: half precision, heads a multiple of 8 wide."""
    return q.element_size() == 2 and q.shape[2] // heads % 8 == 0


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, frames: int, heads: int
) -> Gradients:
    """Gradients of q, k, v (b f) n c from that of `out`, with `lse` (b f) heads n of both frames' keys; contiguous.

    Memory linear in n. On CUDA the same bits every time under `torch.use_deterministic_algorithms(True)`
    alone; with `warn_only` too they differ.
    """
    dq_all, dk_all, dv_all = (torch.zeros(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    lse = lse.unflatten(0, (-1, frames))  # b f heads n
    grad, q, k, v, out, dq, dk, dv = (
        split_heads(x.unflatten(0, (-1, frames)), heads)  # (b f) n (heads d) → b f heads n d
        for x in (grad, q, k, v, out, dq_all, dk_all, dv_all)
    )
    # Every frame reads frame 0: the frames fold into the queries of one call, b heads (f n) d.
    queries = [x.transpose(1, 2).flatten(2, 3) for x in (grad, q, out, lse)]
    part, dk[:, 0], dv[:, 0] = _flash(queries, k[:, 0], v[:, 0])
    dq.copy_(part.unflatten(2, (frames, -1)).transpose(1, 2))
    if frames > 2:  # frames 0 and 1 have no previous frame other than frame 0; no frame reads the last one
        queries = [x[:, 2:].flatten(0, 1) for x in (grad, q, out, lse)]
        parts = _flash(queries, k[:, 1:-1].flatten(0, 1), v[:, 1:-1].flatten(0, 1))
        part, dk[:, 1:-1], dv[:, 1:-1] = (x.unflatten(0, (-1, frames - 2)) for x in parts)
        dq[:, 2:] += part
    return dq_all, dk_all, dv_all


def _flash(queries: list[Tensor], k: Tensor, v: Tensor) -> Gradients:
    """PyTorch's flash backward of b heads n d, without dropout or mask; `queries` are grad, q, out and lse."""
    grad, q, out, lse = queries
    aten, lse = torch.ops.aten, lse.contiguous()
    if not q.is_cuda:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, False)
    # Sequences of one length have no cumulated lengths; without dropout its seed and offset are not read.
    seed, offset = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))
    backward = aten._scaled_dot_product_flash_attention_backward
    return backward(grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, seed, offset)
