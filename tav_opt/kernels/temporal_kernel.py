"""Attention over the frames at each pixel: the Triton kernel and its launcher (README.md has the picture)."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tav_opt.kernels.inputs import LOG2_E, check_launch, split_width
from tav_opt.kernels.sparse_causal_kernel import load_rows, store_rows


@triton.jit
def temporal_kernel(
    q,  # (b f) n (heads width), like k and v; any strides, the last dimension contiguous
    k,
    v,
    n,
    q_frame,  # strides in values: from frame to frame, from token to token
    q_token,
    k_frame,
    k_token,
    v_frame,
    v_token,
    out,  # (b f) n (heads width), contiguous
    FRAMES: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,  # WIDTH is HEAD and a part of REST
    REST: tl.constexpr,
    SCALE: tl.constexpr,  # of the softmax, times log2 e
    ROWS: tl.constexpr,  # frames of as many whole pixels as fit
):
    """One head of a few neighbouring pixels: their frames are the rows of one tile, other pixels' keys are masked."""
    i_head, i_tile, i_clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    PIXELS: tl.constexpr = ROWS // FRAMES
    rows = tl.arange(0, ROWS)
    pixel = rows // FRAMES  # rows past the last pixel are a pixel of their own, of zeros: finite, and never stored
    o_n = i_tile * PIXELS + pixel
    m_row = (pixel < PIXELS) & (o_n < n)
    o_0 = tl.arange(0, HEAD)
    o_1 = HEAD + tl.arange(0, REST if REST else HEAD)
    FULL: tl.constexpr = WIDTH >= HEAD
    FULL_REST: tl.constexpr = WIDTH == HEAD + REST
    frame = (i_clip * FRAMES + rows % FRAMES).to(tl.int64)
    o_q = frame * q_frame + o_n.to(tl.int64) * q_token
    o_k = frame * k_frame + o_n.to(tl.int64) * k_token
    o_v = frame * v_frame + o_n.to(tl.int64) * v_token
    q += i_head * WIDTH
    k += i_head * WIDTH
    v += i_head * WIDTH

    b_q0 = load_rows(q, o_q, o_0, m_row, WIDTH, False, FULL)  # ROWS HEAD
    b_k0 = load_rows(k, o_k, o_0, m_row, WIDTH, False, FULL)
    b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision="ieee")  # ROWS ROWS
    if REST:
        b_q1 = load_rows(q, o_q, o_1, m_row, WIDTH, False, FULL_REST)  # ROWS REST
        b_k1 = load_rows(k, o_k, o_1, m_row, WIDTH, False, FULL_REST)
        b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision="ieee")
    b_s = tl.where(pixel[:, None] == pixel[None, :], b_s * SCALE, float("-inf"))
    b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
    b_share = (1.0 / tl.sum(b_p, 1))[:, None]
    b_p = b_p.to(v.dtype.element_ty)

    width = tl.num_programs(0) * WIDTH  # c
    out += i_head * WIDTH
    o_out = (frame * n + o_n) * width
    b_v0 = load_rows(v, o_v, o_0, m_row, WIDTH, False, FULL)  # ROWS HEAD
    b_o0 = tl.dot(b_p, b_v0, input_precision="ieee") * b_share
    store_rows(out, b_o0.to(out.dtype.element_ty), o_out, o_0, m_row, WIDTH)
    if REST:
        b_v1 = load_rows(v, o_v, o_1, m_row, WIDTH, False, FULL_REST)  # ROWS REST
        b_o1 = tl.dot(b_p, b_v1, input_precision="ieee") * b_share
        store_rows(out, b_o1.to(out.dtype.element_ty), o_out, o_1, m_row, WIDTH)


def tile_rows(frames: int, itemsize: int = 2) -> int:
    """As few rows as the units take, to waste the least on other pixels' keys: 64 a warpgroup, 16 in float32."""
    return max(64 if itemsize == 2 else 16, triton.next_power_of_2(frames))


def constants(width: int, frames: int, itemsize: int = 2) -> dict[str, int | float]:
    """The compile-time constants of `temporal_kernel` for one head width and clip length."""
    split = split_width(width)
    return {
        "FRAMES": frames,
        "WIDTH": width,
        "HEAD": split.head,
        "REST": split.rest,
        "SCALE": width**-0.5 * LOG2_E,
        "ROWS": tile_rows(frames, itemsize),
    }


def grid(b: int, frames: int, n: int, heads: int, itemsize: int = 2) -> tuple[int, int, int]:
    """Programs: heads fastest, so that one pixel's row is read whole while it is in the cache."""
    return heads, triton.cdiv(n, tile_rows(frames, itemsize) // frames), b


def warps(frames: int, width: int) -> int:
    """One warpgroup for 64 narrow rows, two for more: the accumulators stay in registers."""
    return 4 if frames <= 64 and width <= 128 else 8


def launch(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, *, traced: bool = False) -> Tensor:
    """Runs the kernel: q, k, v (b f) n c → (b f) n c, contiguous; clips as long as `temporal.fits` allows.

    `traced`: the call becomes a node of the graph that is being traced, with the kernel and its constants.
    """
    width = check_launch(q, k, v, heads)
    bf, n, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    kernel = torch.library.wrap_triton(temporal_kernel) if traced else temporal_kernel
    kernel[grid(bf // frames, frames, n, heads, q.element_size())](
        q, k, v, n, *strides, out,
        **constants(width, frames, q.element_size()), num_warps=warps(frames, width), num_stages=1,
    )  # fmt: skip
    return out
