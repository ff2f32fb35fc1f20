"""Naive twins of the kernels in plain PyTorch: the ground truth, and what runs without a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def first_and_previous(x: Tensor, frames: int) -> Tensor:
    """Per frame the tokens of frames 0 and i-1 (of 0 twice for frame 0): (b f) n c → (b f) 2n c.

    Expansion and concatenation, not an index: the backward of a gather adds in no fixed order.
    """
    bf, n, c = x.shape
    x = x.reshape(-1, frames, n, c)
    first, previous = x[:, :1].expand(-1, frames, -1, -1), torch.cat([x[:, :1], x[:, :-1]], 1)
    return torch.cat([first, previous], 2).reshape(bf, 2 * n, c)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """… n (heads d) → … heads n d."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def sparse_causal_attention(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """Attention of frame i to frames 0 and i-1 (Tune-A-Video equation 4): q, k, v (b f) n c → (b f) n c."""
    k, v = first_and_previous(k, frames), first_and_previous(v, frames)
    out = F.scaled_dot_product_attention(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads))
    return out.transpose(1, 2).reshape(q.shape)  # (b f) heads n d → (b f) n c


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
    """Attention over all frames at each pixel, unmasked: q, k, v (b f) n c → (b f) n c."""
    bf, n, c = q.shape

    def by_pixel(x: Tensor) -> Tensor:  # (b f) n (heads d) → b n heads f d
        return x.reshape(-1, frames, n, heads, c // heads).permute(0, 2, 3, 1, 4)

    q, k, v = (by_pixel(x).flatten(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, n))
    return out.permute(0, 3, 1, 2, 4).reshape(bf, n, c)  # b n heads f d → (b f) n c


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, frames: int, groups: int, eps: float, *, silu: bool = False
) -> Tensor:
    """GroupNorm with statistics over all frames of a clip, then SiLU if asked: x (b f) c h w → the same shape."""
    y = F.group_norm(x.unflatten(0, (-1, frames)).transpose(1, 2), groups, weight, bias, eps)  # b c f h w
    y = y.transpose(1, 2).flatten(0, 1)
    return F.silu(y) if silu else y


def statistics(x: Tensor, frames: int, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The mean and the reciprocal standard deviation of each clip's groups, float32 (b, groups)."""
    by_group = x.float().unflatten(0, (-1, frames)).unflatten(2, (groups, -1))  # b f groups c/groups h w
    variance, mean = torch.var_mean(by_group, (1, 3, 4, 5), correction=0)
    return mean, (variance + eps).rsqrt()
