"""Group norms over clips, with SiLU inside: the Triton kernels and their launchers (README.md has the layout)."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tav_opt.config import InputError

Norm = tuple[Tensor, Tensor, Tensor]
"""The result, and of each clip and group the mean and the reciprocal standard deviation, float32 (b, groups)."""


class Tile(NamedTuple):
    """One program's tile: rows and channels that it reads at once, how many times, and its warps."""

    rows: int
    channels: int
    steps: int
    warps: int


CANDIDATES = (
    Tile(32, 64, 16, 4), Tile(32, 64, 8, 4), Tile(32, 64, 32, 4), Tile(64, 64, 8, 8), Tile(16, 128, 16, 4),
    Tile(32, 128, 8, 8), Tile(16, 64, 16, 4), Tile(64, 64, 8, 4),
)  # fmt: skip
PROGRAMS = 1024
"""As many keep every card busy: smaller maps take fewer steps a program."""


def tile_for(rows: int, c: int, clips: int) -> Tile:
    """The tile for clips of so many rows: 16 or fewer steps, so that there are PROGRAMS where the map has them."""
    tile = CANDIDATES[0]
    blocks = clips * triton.cdiv(c, tile.channels) * triton.cdiv(rows, tile.rows)
    return tile._replace(steps=max(1, min(tile.steps, blocks // PROGRAMS)))


@triton.jit
def moments_kernel(
    x,  # (b rows) c, contiguous
    rows,  # of a clip
    c,
    mean,  # (b chunks) c, contiguous float32, like squares
    squares,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Some channels of one chunk of a clip's rows: their means, and sums of squared differences from these.

    Summed as differences from the chunk's first row, which lies near: nothing is lost where the mean is large.
    """
    i_c, i_chunk, i_clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < c
    start = i_chunk * ROWS * STEPS
    x += i_clip.to(tl.int64) * rows * c
    b_first = tl.load(x + start.to(tl.int64) * c + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_sum = tl.zeros((ROWS, CHANNELS), tl.float32)
    b_squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(STEPS):
        o_row = start + step * ROWS + tl.arange(0, ROWS)
        m_x = (o_row < rows)[:, None] & m_c[None, :]
        b_x = tl.load(x + o_row.to(tl.int64)[:, None] * c + o_c[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.where(m_x, b_x - b_first[None, :], 0.0)
        b_sum += b_x
        b_squares += b_x * b_x
    count = tl.minimum(rows - start, ROWS * STEPS).to(tl.float32)
    b_shift = tl.sum(b_sum, 0) / count
    o_out = (i_clip * tl.num_programs(1) + i_chunk).to(tl.int64) * c + o_c
    tl.store(mean + o_out, b_first + b_shift, mask=m_c)
    tl.store(squares + o_out, tl.sum(b_squares, 0) - b_shift * b_shift * count, mask=m_c)


@triton.jit
def statistics_kernel(
    mean,  # (b chunks) c, contiguous float32, like squares
    squares,
    chunks,
    rows,
    c,
    size,  # channels of a group
    group_mean,  # b groups, contiguous float32, like group_rstd
    group_rstd,
    EPS: tl.constexpr,
    CHUNK: tl.constexpr,  # rows of a chunk; the last one may have fewer
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two from size on
):
    """One group of one clip: the moments of its chunks together (Chan, Golub & LeVeque 1983)."""
    i_group, i_clip = tl.program_id(0), tl.program_id(1)
    o_c = tl.arange(0, WIDTH)
    p_c = (i_clip * chunks).to(tl.int64) * c + i_group * size + o_c
    total = rows * size * 1.0
    b_sum = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for start in range(0, chunks, CHUNKS):
        o_chunk = start + tl.arange(0, CHUNKS)
        m_part = (o_chunk < chunks)[:, None] & (o_c < size)[None, :]
        count = tl.minimum(rows - o_chunk * CHUNK, CHUNK).to(tl.float32)
        b_mean = tl.load(mean + o_chunk.to(tl.int64)[:, None] * c + p_c[None, :], mask=m_part, other=0.0)
        b_sum += b_mean * count[:, None]
    center = tl.sum(b_sum) / total
    b_sum = tl.zeros((CHUNKS, WIDTH), tl.float32)
    for start in range(0, chunks, CHUNKS):
        o_chunk = start + tl.arange(0, CHUNKS)
        m_part = (o_chunk < chunks)[:, None] & (o_c < size)[None, :]
        count = tl.minimum(rows - o_chunk * CHUNK, CHUNK).to(tl.float32)
        o_part = o_chunk.to(tl.int64)[:, None] * c + p_c[None, :]
        b_away = tl.load(mean + o_part, mask=m_part, other=0.0) - center
        b_squares = tl.load(squares + o_part, mask=m_part, other=0.0)
        b_sum += tl.where(m_part, b_squares + b_away * b_away * count[:, None], 0.0)
    o_out = i_clip * tl.num_programs(0) + i_group
    tl.store(group_mean + o_out, center)
    tl.store(group_rstd + o_out, 1.0 / tl.sqrt(tl.sum(b_sum) / total + EPS))


@triton.jit
def normalize_kernel(
    x,  # (b rows) c, contiguous, like out
    weight,  # c, contiguous, like bias
    bias,
    group_mean,  # b groups, contiguous float32, like group_rstd
    group_rstd,
    rows,
    c,
    size,
    out,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Some channels of one chunk of a clip's rows: normalised, scaled, and through SiLU where that is asked for."""
    i_c, i_chunk, i_clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < c
    o_group = i_clip * (c // size) + o_c // size
    b_mean = tl.load(group_mean + o_group, mask=m_c, other=0.0)
    b_scale = tl.load(group_rstd + o_group, mask=m_c, other=0.0) * tl.load(weight + o_c, mask=m_c, other=0.0)
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    x += i_clip.to(tl.int64) * rows * c
    out += i_clip.to(tl.int64) * rows * c
    for step in range(STEPS):
        o_row = (i_chunk * STEPS + step) * ROWS + tl.arange(0, ROWS)
        m_x = (o_row < rows)[:, None] & m_c[None, :]
        o_x = o_row.to(tl.int64)[:, None] * c + o_c[None, :]
        b_x = tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_y = (b_x - b_mean[None, :]) * b_scale[None, :] + b_bias[None, :]
        if SILU:
            b_y = b_y * tl.sigmoid(b_y)
        tl.store(out + o_x, b_y.to(out.dtype.element_ty), mask=m_x)


def rows_of(x: Tensor) -> Tensor:
    """(b f) c h w → the same memory as ((b f h w), c), copied where its channels do not come last."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    frames: int,
    groups: int,
    eps: float,
    silu: bool,
    *,
    tile: Tile | None = None,
    traced: bool = False,
) -> Norm:
    """Runs the kernels: x (b f) c h w → the same shape, its channels last in memory; and the groups' statistics.

    `tile` in place of `tile_for`'s. `traced`: the calls become nodes of the graph that is being traced.
    """
    if str(x.dtype) not in ("torch.float16", "torch.bfloat16", "torch.float32"):
        raise InputError(f"dtype {x.dtype}: the kernels take float16, bfloat16, float32")
    bf, c, h, w = x.shape
    b, rows, size = bf // frames, frames * h * w, c // groups
    tile = tile or tile_for(rows, c, 1 if traced else b)  # a traced number of clips is none yet
    chunk = tile.rows * tile.steps
    chunks = triton.cdiv(rows, chunk)
    x = rows_of(x)
    out = torch.empty((bf, c, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    mean, squares = (torch.empty(b * chunks, c, dtype=torch.float32, device=x.device) for _ in range(2))
    group_mean, group_rstd = (torch.empty(b, groups, dtype=torch.float32, device=x.device) for _ in range(2))
    grid = (triton.cdiv(c, tile.channels), chunks, b)
    sizes = {"ROWS": tile.rows, "CHANNELS": tile.channels, "STEPS": tile.steps}
    _kernel(moments_kernel, traced)[grid](x, rows, c, mean, squares, **sizes, num_warps=tile.warps)
    _kernel(statistics_kernel, traced)[(groups, b)](
        mean, squares, chunks, rows, c, size, group_mean, group_rstd,
        EPS=eps, CHUNK=chunk, CHUNKS=16, WIDTH=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    _kernel(normalize_kernel, traced)[grid](
        x, weight, bias, group_mean, group_rstd, rows, c, size, out, SILU=silu, **sizes, num_warps=tile.warps
    )
    return out, group_mean, group_rstd


def _kernel(kernel: Any, traced: bool) -> Any:
    return torch.library.wrap_triton(kernel) if traced else kernel
