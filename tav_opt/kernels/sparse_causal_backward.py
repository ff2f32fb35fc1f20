"""The backward of sparse-causal attention: its Triton kernels and their launcher (README.md has the layout)."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tav_opt.kernels.inputs import check_launch
from tav_opt.kernels.sparse_causal_kernel import constants, load_rows, store_rows
from tav_opt.kernels.tiles import Tile, architecture, backward_tiles

PARTIALS = 256 << 20
"""Bytes that the gradients of frame 0's keys and values by frame may take; they are summed in groups of frames."""
Gradients = tuple[Tensor, Tensor, Tensor]


@triton.jit
def query_gradients_kernel(
    q,  # (b f) n (heads width), like k and v; any strides, the last dimension contiguous
    k,
    v,
    out,  # (b f) n (heads width), contiguous, like grad and dq
    grad,  # of out
    lse,  # (b f) heads n, contiguous float32, like delta
    frames,
    n,
    q_frame,  # strides in values: from frame to frame, from token to token
    q_token,
    k_frame,
    k_token,
    v_frame,
    v_token,
    dq,
    delta,  # the sum of out times grad over each row, which the gradients of the keys need too
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,  # WIDTH is HEAD and a part of REST
    REST: tl.constexpr,
    SCALE: tl.constexpr,  # of the softmax, times log2 e
    QUERIES: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,  # whether n is a multiple of both
):
    """One tile of queries of one head of one frame: the forward's loop over the keys of frames 0 and i-1."""
    i_tile, i_head, i_z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    clips = tl.num_programs(2) // frames
    i_frame = frames - 1 - i_z // clips  # the last frames start first, as in the forward
    first = (i_z % clips) * frames
    previous = first + tl.maximum(i_frame - 1, 0)
    row = (first + i_frame).to(tl.int64)

    o_q = i_tile * QUERIES + tl.arange(0, QUERIES)
    o_k = tl.arange(0, KEYS)
    o_0 = tl.arange(0, HEAD)
    o_1 = HEAD + tl.arange(0, REST if REST else HEAD)
    FULL: tl.constexpr = WIDTH >= HEAD
    FULL_REST: tl.constexpr = WIDTH == HEAD + REST
    m_q = o_q < n
    width = tl.num_programs(1) * WIDTH  # c
    q += row * q_frame + i_head * WIDTH
    out += row * n * width + i_head * WIDTH
    grad += row * n * width + i_head * WIDTH
    dq += row * n * width + i_head * WIDTH
    lse += (row * tl.num_programs(1) + i_head) * n
    delta += (row * tl.num_programs(1) + i_head) * n
    o_row = o_q.to(tl.int64) * q_token
    o_out = o_q.to(tl.int64) * width

    b_q0 = load_rows(q, o_row, o_0, m_q, WIDTH, EVEN, FULL)  # QUERIES HEAD
    b_g0 = load_rows(grad, o_out, o_0, m_q, WIDTH, EVEN, FULL)
    b_o = load_rows(out, o_out, o_0, m_q, WIDTH, EVEN, FULL)
    b_delta = tl.sum(b_o.to(tl.float32) * b_g0.to(tl.float32), 1)
    b_dq0 = tl.zeros((QUERIES, HEAD), tl.float32)
    if REST:
        b_q1 = load_rows(q, o_row, o_1, m_q, WIDTH, EVEN, FULL_REST)  # QUERIES REST
        b_g1 = load_rows(grad, o_out, o_1, m_q, WIDTH, EVEN, FULL_REST)
        b_o = load_rows(out, o_out, o_1, m_q, WIDTH, EVEN, FULL_REST)
        b_delta += tl.sum(b_o.to(tl.float32) * b_g1.to(tl.float32), 1)
        b_dq1 = tl.zeros((QUERIES, REST), tl.float32)
    tl.store(delta + o_q, b_delta, mask=m_q)
    b_lse = tl.load(lse + o_q, mask=m_q, other=0.0) * 1.4426950408889634  # log2 e

    tiles = tl.cdiv(n, KEYS)
    for i in range(0, tl.where(i_frame < 2, tiles, 2 * tiles)):
        source = tl.where(i < tiles, first, previous).to(tl.int64)
        start = tl.where(i < tiles, i, i - tiles) * KEYS
        m_k = start + o_k < n
        p_k = k + source * k_frame + start.to(tl.int64) * k_token + i_head * WIDTH
        p_v = v + source * v_frame + start.to(tl.int64) * v_token + i_head * WIDTH
        b_k0 = load_rows(p_k, o_k * k_token, o_0, m_k, WIDTH, EVEN, FULL)  # KEYS HEAD
        b_v0 = load_rows(p_v, o_k * v_token, o_0, m_k, WIDTH, EVEN, FULL)
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision="ieee")  # QUERIES KEYS
        b_dp = tl.dot(b_g0, tl.trans(b_v0), input_precision="ieee")
        if REST:
            b_k1 = load_rows(p_k, o_k * k_token, o_1, m_k, WIDTH, EVEN, FULL_REST)  # KEYS REST
            b_v1 = load_rows(p_v, o_k * v_token, o_1, m_k, WIDTH, EVEN, FULL_REST)
            b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision="ieee")
            b_dp = tl.dot(b_g1, tl.trans(b_v1), b_dp, input_precision="ieee")
        if not EVEN:  # where all scores are far below zero, that of a key past the frame's end is infinite beside them
            b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_p = tl.exp2(b_s * SCALE - b_lse[:, None])
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(k.dtype.element_ty)
        b_dq0 = tl.dot(b_ds, b_k0, b_dq0, input_precision="ieee")
        if REST:
            b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision="ieee")

    ROOT: tl.constexpr = SCALE * 0.6931471805599453  # without log2 e
    store_rows(dq, (b_dq0 * ROOT).to(dq.dtype.element_ty), o_out, o_0, m_q, WIDTH)
    if REST:
        store_rows(dq, (b_dq1 * ROOT).to(dq.dtype.element_ty), o_out, o_1, m_q, WIDTH)


@triton.jit
def key_gradients_kernel(
    q,  # (b f) n (heads width), like k and v; any strides, the last dimension contiguous
    k,
    v,
    grad,  # (b f) n (heads width), contiguous, like dk and dv
    lse,  # (b f) heads n, contiguous float32, like delta
    delta,
    frames,
    start,  # the first of the group of frames whose queries count here
    group,  # how many
    n,
    q_frame,  # strides in values: from frame to frame, from token to token
    q_token,
    k_frame,
    k_token,
    v_frame,
    v_token,
    dk,
    dv,
    dk_first,  # b group n (heads width), contiguous float32, like dv_first: of frame 0 by the frame that reads it
    dv_first,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,  # WIDTH is HEAD and a part of REST
    REST: tl.constexpr,
    SCALE: tl.constexpr,  # of the softmax, times log2 e
    QUERIES: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,
    EVEN: tl.constexpr,  # whether n is a multiple of both
):
    """One tile of keys of one head, read by one frame: the only writer of its part, so that nothing is added twice.

    The pairs of a group: each of its frames with frame 0, then each from frame 2 on with the frame before.
    """
    i_tile, i_head, i_z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    later = tl.maximum(start, 2)  # the first frame that has a previous frame other than frame 0
    pairs = group + tl.maximum(start + group - later, 0)
    i_clip, i_pair = i_z // pairs, i_z % pairs
    of_first = i_pair < group
    i_frame = tl.where(of_first, start + i_pair, later + i_pair - group)
    row = (i_clip * frames + i_frame).to(tl.int64)
    source = (i_clip * frames + tl.where(of_first, 0, i_frame - 1)).to(tl.int64)

    o_k = i_tile * KEYS + tl.arange(0, KEYS)
    o_q = tl.arange(0, QUERIES)
    o_0 = tl.arange(0, HEAD)
    o_1 = HEAD + tl.arange(0, REST if REST else HEAD)
    FULL: tl.constexpr = WIDTH >= HEAD
    FULL_REST: tl.constexpr = WIDTH == HEAD + REST
    m_k = o_k < n
    width = tl.num_programs(1) * WIDTH  # c
    k += source * k_frame + i_head * WIDTH
    v += source * v_frame + i_head * WIDTH
    b_k0 = load_rows(k, o_k.to(tl.int64) * k_token, o_0, m_k, WIDTH, EVEN, FULL)  # KEYS HEAD
    b_v0 = load_rows(v, o_k.to(tl.int64) * v_token, o_0, m_k, WIDTH, EVEN, FULL)
    b_dk0 = tl.zeros((KEYS, HEAD), tl.float32)
    b_dv0 = tl.zeros((KEYS, HEAD), tl.float32)
    if REST:
        b_k1 = load_rows(k, o_k.to(tl.int64) * k_token, o_1, m_k, WIDTH, EVEN, FULL_REST)  # KEYS REST
        b_v1 = load_rows(v, o_k.to(tl.int64) * v_token, o_1, m_k, WIDTH, EVEN, FULL_REST)
        b_dk1 = tl.zeros((KEYS, REST), tl.float32)
        b_dv1 = tl.zeros((KEYS, REST), tl.float32)

    q += row * q_frame + i_head * WIDTH
    grad += row * n * width + i_head * WIDTH
    lse += (row * tl.num_programs(1) + i_head) * n
    delta += (row * tl.num_programs(1) + i_head) * n
    for i in range(0, tl.cdiv(n, QUERIES)):
        at = i * QUERIES
        m_q = at + o_q < n
        p_q = q + at.to(tl.int64) * q_token
        p_g = grad + at.to(tl.int64) * width
        b_q0 = load_rows(p_q, o_q * q_token, o_0, m_q, WIDTH, EVEN, FULL)  # QUERIES HEAD
        b_g0 = load_rows(p_g, o_q * width, o_0, m_q, WIDTH, EVEN, FULL)
        b_s = tl.dot(b_k0, tl.trans(b_q0), input_precision="ieee")  # KEYS QUERIES
        b_dp = tl.dot(b_v0, tl.trans(b_g0), input_precision="ieee")
        if REST:
            b_q1 = load_rows(p_q, o_q * q_token, o_1, m_q, WIDTH, EVEN, FULL_REST)  # QUERIES REST
            b_g1 = load_rows(p_g, o_q * width, o_1, m_q, WIDTH, EVEN, FULL_REST)
            b_s = tl.dot(b_k1, tl.trans(b_q1), b_s, input_precision="ieee")
            b_dp = tl.dot(b_v1, tl.trans(b_g1), b_dp, input_precision="ieee")
        # A query past the frame's end is of zeros, and adds zeros; a key past it has a row of its own, never stored.
        b_lse = tl.load(lse + at + o_q, mask=m_q, other=0.0) * 1.4426950408889634  # log2 e
        b_delta = tl.load(delta + at + o_q, mask=m_q, other=0.0)
        b_p = tl.exp2(b_s * SCALE - b_lse[None, :])
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(q.dtype.element_ty)
        b_p = b_p.to(grad.dtype.element_ty)
        b_dv0 = tl.dot(b_p, b_g0, b_dv0, input_precision="ieee")
        b_dk0 = tl.dot(b_ds, b_q0, b_dk0, input_precision="ieee")
        if REST:
            b_dv1 = tl.dot(b_p, b_g1, b_dv1, input_precision="ieee")
            b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision="ieee")

    ROOT: tl.constexpr = SCALE * 0.6931471805599453  # without log2 e
    o_row = o_k.to(tl.int64) * width
    b_dk0 *= ROOT
    if REST:
        b_dk1 *= ROOT
    if of_first:
        part = (i_clip * group + i_pair).to(tl.int64) * n * width + i_head * WIDTH
        store_rows(dk_first + part, b_dk0, o_row, o_0, m_k, WIDTH)
        store_rows(dv_first + part, b_dv0, o_row, o_0, m_k, WIDTH)
        if REST:
            store_rows(dk_first + part, b_dk1, o_row, o_1, m_k, WIDTH)
            store_rows(dv_first + part, b_dv1, o_row, o_1, m_k, WIDTH)
    else:
        part = source * n * width + i_head * WIDTH
        store_rows(dk + part, b_dk0.to(dk.dtype.element_ty), o_row, o_0, m_k, WIDTH)
        store_rows(dv + part, b_dv0.to(dv.dtype.element_ty), o_row, o_0, m_k, WIDTH)
        if REST:
            store_rows(dk + part, b_dk1.to(dk.dtype.element_ty), o_row, o_1, m_k, WIDTH)
            store_rows(dv + part, b_dv1.to(dv.dtype.element_ty), o_row, o_1, m_k, WIDTH)


def launch(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    frames: int,
    heads: int,
    *,
    tiles: tuple[Tile, Tile] | None = None,
) -> Gradients:
    """Gradients of q, k, v (b f) n c from that of `out`, which came with `lse` of `launch_with_lse`; contiguous.

    The same bits every time: no two programs write to one place. Beside its results and 4 bytes a query and head it
    holds 8 bytes for each value of frame 0's keys and frame that reads them: 8 b f n c, PARTIALS at most (or one
    frame's), and 8 b n c for their sum. `tiles`, of the queries' and of the keys' kernel, in place of the table's.
    """
    width = check_launch(q, k, v, heads)
    for_queries, for_keys = tiles or backward_tiles(architecture(q), q.shape[1], width, q.element_size())
    grad, delta = grad.contiguous(), torch.empty_like(lse)
    dq = query_gradients(grad, q, k, v, out, lse, delta, frames, heads, for_queries)
    return dq, *key_gradients(grad, q, k, v, lse, delta, frames, heads, for_keys)


def query_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    frames: int,
    heads: int,
    tile: Tile,
) -> Tensor:
    """The gradient of q; fills `delta`, float32 (b f) heads n, for `key_gradients`."""
    bf, n, c = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    query_gradients_kernel[(triton.cdiv(n, tile.queries), heads, bf)](
        q, k, v, out, grad, lse, frames, n, *_strides(q, k, v), dq, delta,
        **constants(c // heads, n, tile), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dq


def key_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, frames: int, heads: int, tile: Tile
) -> tuple[Tensor, Tensor]:
    """The gradients of k and v: each pair of frames writes its own part; those of frame 0 are summed in order."""
    bf, n, c = q.shape
    b = bf // frames
    dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    first = torch.zeros(2, b, n, c, dtype=torch.float32, device=q.device)
    step = max(1, PARTIALS // (8 * b * n * c))  # frames in a group
    for start in range(0, frames, step):
        group = min(step, frames - start)
        partial = torch.empty(2, b, group, n, c, dtype=torch.float32, device=q.device)
        pairs = group + max(0, start + group - max(start, 2))
        key_gradients_kernel[(triton.cdiv(n, tile.keys), heads, b * pairs)](
            q, k, v, grad, lse, delta, frames, start, group, n, *_strides(q, k, v), dk, dv, *partial,
            **constants(c // heads, n, tile), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        first += partial.sum(2)
    for of_frame, total in zip((dk, dv), first, strict=True):
        of_frame = of_frame.unflatten(0, (b, frames))
        of_frame[:, -1] = 0  # no frame reads the last one
        of_frame[:, 0] = total
    return dk, dv


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]
