"""The backward of group norms over clips: sums over each chunk of rows, then the gradient of the input."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tav_opt.kernels.group_norm_kernel import Tile, rows_of, tile_for

Gradients = tuple[Tensor, Tensor, Tensor]


@triton.jit
def through_silu(b_g, b_y, SILU: tl.constexpr):
    """The gradient of SiLU's input b_y where that of its output is b_g; without SiLU the same."""
    if SILU:
        b_share = tl.sigmoid(b_y)
        b_g = b_g * b_share * (1.0 + b_y * (1.0 - b_share))
    return b_g


@triton.jit
def sums_kernel(
    x,  # (b rows) c, contiguous, like grad
    grad,
    weight,  # c, contiguous, like bias
    bias,
    group_mean,  # b groups, contiguous float32, like group_rstd
    group_rstd,
    rows,
    c,
    size,  # channels of a group
    of_bias,  # (b chunks) c, contiguous float32, like of_weight
    of_weight,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Some channels of one chunk of a clip's rows: their part of the gradients of bias and weight."""
    i_c, i_chunk, i_clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < c
    o_group = i_clip * (c // size) + o_c // size
    b_mean = tl.load(group_mean + o_group, mask=m_c, other=0.0)
    b_rstd = tl.load(group_rstd + o_group, mask=m_c, other=0.0)
    b_weight = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    x += i_clip.to(tl.int64) * rows * c
    grad += i_clip.to(tl.int64) * rows * c
    b_of_bias = tl.zeros((ROWS, CHANNELS), tl.float32)
    b_of_weight = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(STEPS):
        o_row = (i_chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_x = (o_row < rows)[:, None] & m_c[None, :]
        o_x = o_row.to(tl.int64)[:, None] * c + o_c[None, :]
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_g = tl.load(grad + o_x, mask=m_x, other=0.0).to(tl.float32)  # zeros add nothing
        b_x = (b_x - b_mean[None, :]) * b_rstd[None, :]
        b_g = through_silu(b_g, b_x * b_weight[None, :] + b_bias[None, :], SILU)
        b_of_bias += b_g
        b_of_weight += b_g * b_x
    o_out = (i_clip * tl.num_programs(1) + i_chunk).to(tl.int64) * c + o_c
    tl.store(of_bias + o_out, tl.sum(b_of_bias, 0), mask=m_c)
    tl.store(of_weight + o_out, tl.sum(b_of_weight, 0), mask=m_c)


@triton.jit
def input_gradient_kernel(
    x,  # (b rows) c, contiguous, like grad and dx
    grad,
    weight,  # c, contiguous, like bias
    bias,
    group_mean,  # b groups, contiguous float32, like group_rstd, of_mean and of_rstd
    group_rstd,
    of_mean,  # the mean over a group of weight · gradient, and of that times the normalised input
    of_rstd,
    rows,
    c,
    size,
    dx,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Some channels of one chunk of a clip's rows: the gradient of x."""
    i_c, i_chunk, i_clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < c
    o_group = i_clip * (c // size) + o_c // size
    b_mean = tl.load(group_mean + o_group, mask=m_c, other=0.0)
    b_rstd = tl.load(group_rstd + o_group, mask=m_c, other=0.0)
    b_of_mean = tl.load(of_mean + o_group, mask=m_c, other=0.0)
    b_of_rstd = tl.load(of_rstd + o_group, mask=m_c, other=0.0)
    b_weight = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    x += i_clip.to(tl.int64) * rows * c
    grad += i_clip.to(tl.int64) * rows * c
    dx += i_clip.to(tl.int64) * rows * c
    for step in range(STEPS):
        o_row = (i_chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_x = (o_row < rows)[:, None] & m_c[None, :]
        o_x = o_row.to(tl.int64)[:, None] * c + o_c[None, :]
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_g = tl.load(grad + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_x = (b_x - b_mean[None, :]) * b_rstd[None, :]
        b_g = through_silu(b_g, b_x * b_weight[None, :] + b_bias[None, :], SILU) * b_weight[None, :]
        b_dx = (b_g - b_of_mean[None, :] - b_x * b_of_rstd[None, :]) * b_rstd[None, :]
        tl.store(dx + o_x, b_dx.to(dx.dtype.element_ty), mask=m_x)


def launch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    frames: int,
    silu: bool,
    *,
    tile: Tile | None = None,
) -> Gradients:
    """Gradients of x (b f) c h w, its channels last in memory, and of weight and bias, from that of the result.

    `mean` and `rstd` (b, groups) are the forward's. The same bits every time: chunks are summed in a fixed order.
    """
    bf, c, h, w = x.shape
    (b, groups), rows = mean.shape, frames * h * w
    tile = tile or tile_for(rows, c, b)
    chunks = triton.cdiv(rows, tile.rows * tile.steps)
    dx = torch.empty((bf, c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    x, grad = rows_of(x), rows_of(grad)
    partial = torch.empty(2, b, chunks, c, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(c, tile.channels), chunks, b)
    sizes = {"SILU": silu, "ROWS": tile.rows, "CHANNELS": tile.channels, "STEPS": tile.steps}
    sums_kernel[grid](
        x, grad, weight, bias, mean, rstd, rows, c, c // groups, *partial, **sizes, num_warps=tile.warps
    )  # fmt: skip
    by_clip = partial.sum(2)  # of bias and weight, b c
    of_mean, of_rstd = (by_clip * weight.float()).unflatten(2, (groups, -1)).sum(3) / (rows * (c // groups))
    input_gradient_kernel[grid](
        x, grad, weight, bias, mean, rstd, of_mean, of_rstd, rows, c, c // groups, dx, **sizes, num_warps=tile.warps
    )
    of_bias, of_weight = (of_clips.sum(0).to(weight.dtype) for of_clips in by_clip)
    return dx, of_weight, of_bias
