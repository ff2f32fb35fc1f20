"""The ablation's UNet without sparse-causal attention: each frame looks at itself alone (paper section 4.4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.nn import functional

from tav_opt import attention


def each_frame_alone(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """The image model's own self-attention in the place of equation 4; q, k, v (b f) n c → (b f) n c.

    `frames` is of the signature alone.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@contextmanager
def without_sparse_causal() -> Iterator[None]:
    """For the block, all video UNets of this process attend so."""
    before = attention.sparse_causal_attention
    attention.sparse_causal_attention = each_frame_alone
    try:
        yield
    finally:
        attention.sparse_causal_attention = before
