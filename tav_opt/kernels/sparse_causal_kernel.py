"""Sparse first-and-previous-frame attention: the Triton kernel and its launcher (README.md has the mathematics)."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tav_opt.kernels.inputs import LOG2_E, check_launch, split_width
from tav_opt.kernels.tiles import Tile, architecture, sparse_causal_tile


@triton.jit
def load_rows(x, o_row, o_column, m_row, WIDTH: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    """Rows of one head; zero past the frame's end (unless EVEN) and past the head's width (unless FULL)."""
    p_x = x + o_row[:, None] + o_column[None, :]
    if EVEN and FULL:
        b_x = tl.load(p_x)
    elif EVEN:
        b_x = tl.load(p_x, mask=(o_column < WIDTH)[None, :], other=0.0)
    elif FULL:
        b_x = tl.load(p_x, mask=m_row[:, None], other=0.0)
    else:
        b_x = tl.load(p_x, mask=m_row[:, None] & (o_column < WIDTH)[None, :], other=0.0)
    return b_x


@triton.jit
def store_rows(x, b_x, o_row, o_column, m_row, WIDTH: tl.constexpr):
    """The counterpart of load_rows."""
    tl.store(x + o_row[:, None] + o_column[None, :], b_x, mask=m_row[:, None] & (o_column < WIDTH)[None, :])


@triton.jit
def sparse_causal_kernel(
    q,  # (b f) n (heads width), like k and v; any strides, the last dimension contiguous
    k,
    v,
    frames,
    n,
    q_frame,  # strides in values: from frame to frame, from token to token
    q_token,
    k_frame,
    k_token,
    v_frame,
    v_token,
    out,  # (b f) n (heads width), contiguous
    lse,  # (b f) heads n, contiguous float32: the natural logarithm of the sums; None where nothing asks for it
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,  # WIDTH is HEAD and a part of REST
    REST: tl.constexpr,
    SCALE: tl.constexpr,  # of the softmax, times log2 e
    QUERIES: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,  # whether n is a multiple of both
):
    """One tile of queries of one head of one frame: online softmax over the keys of frames 0 and i-1, in place."""
    i_tile, i_head, i_z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The last frames start first: frames 0 and 1 have half the keys and fill the gaps at the end.
    clips = tl.num_programs(2) // frames
    i_frame = frames - 1 - i_z // clips
    first = (i_z % clips) * frames
    previous = first + tl.maximum(i_frame - 1, 0)

    o_q = i_tile * QUERIES + tl.arange(0, QUERIES)
    o_k = tl.arange(0, KEYS)
    o_0 = tl.arange(0, HEAD)
    FULL: tl.constexpr = WIDTH >= HEAD
    FULL_REST: tl.constexpr = WIDTH == HEAD + REST
    m_q = o_q < n
    q += (first + i_frame).to(tl.int64) * q_frame + i_head * WIDTH
    o_row = o_q.to(tl.int64) * q_token
    b_q0 = load_rows(q, o_row, o_0, m_q, WIDTH, EVEN, FULL)  # QUERIES HEAD
    b_o0 = tl.zeros((QUERIES, HEAD), tl.float32)
    if REST:
        o_1 = HEAD + tl.arange(0, REST)
        b_q1 = load_rows(q, o_row, o_1, m_q, WIDTH, EVEN, FULL_REST)  # QUERIES REST
        b_o1 = tl.zeros((QUERIES, REST), tl.float32)
    b_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    b_sum = tl.zeros((QUERIES,), tl.float32)

    tiles = tl.cdiv(n, KEYS)
    # Frames 0 and 1 would read frame 0 twice: a softmax over doubled keys equals that over one copy.
    for i in range(0, tl.where(i_frame < 2, tiles, 2 * tiles)):
        source = tl.where(i < tiles, first, previous).to(tl.int64)
        start = tl.where(i < tiles, i, i - tiles) * KEYS
        m_k = start + o_k < n
        p_k = k + source * k_frame + start.to(tl.int64) * k_token + i_head * WIDTH
        p_v = v + source * v_frame + start.to(tl.int64) * v_token + i_head * WIDTH
        b_k0 = load_rows(p_k, o_k * k_token, o_0, m_k, WIDTH, EVEN, FULL)  # KEYS HEAD
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision="ieee")  # QUERIES KEYS
        if REST:
            b_k1 = load_rows(p_k, o_k * k_token, o_1, m_k, WIDTH, EVEN, FULL_REST)  # KEYS REST
            b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision="ieee")
        if not EVEN:
            b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * SCALE)
        b_p = tl.exp2(b_s * SCALE - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new
        b_p = b_p.to(v.dtype.element_ty)
        b_v0 = load_rows(p_v, o_k * v_token, o_0, m_k, WIDTH, EVEN, FULL)  # KEYS HEAD
        b_o0 = tl.dot(b_p, b_v0, b_o0 * b_decay[:, None], input_precision="ieee")
        if REST:
            b_v1 = load_rows(p_v, o_k * v_token, o_1, m_k, WIDTH, EVEN, FULL_REST)  # KEYS REST
            b_o1 = tl.dot(b_p, b_v1, b_o1 * b_decay[:, None], input_precision="ieee")

    width = tl.num_programs(1) * WIDTH  # c
    out += (first + i_frame).to(tl.int64) * n * width + i_head * WIDTH
    o_row = o_q.to(tl.int64) * width
    b_share = (1.0 / b_sum)[:, None]
    store_rows(out, (b_o0 * b_share).to(out.dtype.element_ty), o_row, o_0, m_q, WIDTH)
    if REST:
        store_rows(out, (b_o1 * b_share).to(out.dtype.element_ty), o_row, o_1, m_q, WIDTH)
    if lse is not None:
        lse += ((first + i_frame) * tl.num_programs(1) + i_head).to(tl.int64) * n
        tl.store(lse + o_q, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=m_q)  # ln 2


def constants(width: int, n: int, tile: Tile) -> dict[str, int | float | bool]:
    """The compile-time constants of `sparse_causal_kernel` for one head width, frame size and tile."""
    split = split_width(width)
    return {
        "WIDTH": width,
        "HEAD": split.head,
        "REST": split.rest,
        "SCALE": width**-0.5 * LOG2_E,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "EVEN": n % tile.queries == 0 and n % tile.keys == 0,
    }


def launch(
    q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, *, tile: Tile | None = None, traced: bool = False
) -> Tensor:
    """Runs the kernel: q, k, v (b f) n c → (b f) n c, contiguous; `tile` in place of the table's (autotuning).

    `traced`: the call becomes a node of the graph that is being traced, with the kernel and its constants.
    """
    kernel = torch.library.wrap_triton(sparse_causal_kernel) if traced else sparse_causal_kernel
    return _run(kernel, q, k, v, frames, heads, None, tile)


def launch_with_lse(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> tuple[Tensor, Tensor]:
    """As `launch`, and the log-sum-exp of each query's scaled scores, float32 (b f) heads n, for the backward."""
    lse = torch.empty(q.shape[0], heads, q.shape[1], dtype=torch.float32, device=q.device)
    return _run(sparse_causal_kernel, q, k, v, frames, heads, lse, None), lse


def _run(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, lse: Tensor | None, tile: Tile | None
) -> Tensor:
    width = check_launch(q, k, v, heads)
    bf, n, _ = q.shape
    tile = tile or sparse_causal_tile(architecture(q), n, width, q.element_size())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    kernel[(triton.cdiv(n, tile.queries), heads, bf)](
        q, k, v, frames, n, *strides, out, lse,
        **constants(width, n, tile), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
