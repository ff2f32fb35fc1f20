"""The backward of attention over the frames at each pixel: one tile a program, as in the forward."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tav_opt.kernels.inputs import check_launch, temporal_backward_rows
from tav_opt.kernels.sparse_causal_kernel import load_rows, store_rows
from tav_opt.kernels.temporal_kernel import constants


@triton.jit
def temporal_backward_kernel(
    q,  # (b f) n (heads width), like k and v; any strides, the last dimension contiguous
    k,
    v,
    grad,  # (b f) n (heads width), contiguous, like dq, dk and dv
    n,
    q_frame,  # strides in values: from frame to frame, from token to token
    q_token,
    k_frame,
    k_token,
    v_frame,
    v_token,
    dq,
    dk,
    dv,
    FRAMES: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,  # WIDTH is HEAD and a part of REST
    REST: tl.constexpr,
    SCALE: tl.constexpr,  # of the softmax, times log2 e
    ROWS: tl.constexpr,  # frames of as many whole pixels as fit
):
    """One head of a few neighbouring pixels: their weights computed again, and all three gradients."""
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
    width = tl.num_programs(0) * WIDTH  # c
    o_q = frame * q_frame + o_n.to(tl.int64) * q_token + i_head * WIDTH
    o_k = frame * k_frame + o_n.to(tl.int64) * k_token + i_head * WIDTH
    o_v = frame * v_frame + o_n.to(tl.int64) * v_token + i_head * WIDTH
    o_out = (frame * n + o_n) * width + i_head * WIDTH

    b_q0 = load_rows(q, o_q, o_0, m_row, WIDTH, False, FULL)  # ROWS HEAD
    b_k0 = load_rows(k, o_k, o_0, m_row, WIDTH, False, FULL)
    b_v0 = load_rows(v, o_v, o_0, m_row, WIDTH, False, FULL)
    b_g0 = load_rows(grad, o_out, o_0, m_row, WIDTH, False, FULL)
    b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision="ieee")  # ROWS ROWS
    b_dp = tl.dot(b_g0, tl.trans(b_v0), input_precision="ieee")
    if REST:
        b_q1 = load_rows(q, o_q, o_1, m_row, WIDTH, False, FULL_REST)  # ROWS REST
        b_k1 = load_rows(k, o_k, o_1, m_row, WIDTH, False, FULL_REST)
        b_v1 = load_rows(v, o_v, o_1, m_row, WIDTH, False, FULL_REST)
        b_g1 = load_rows(grad, o_out, o_1, m_row, WIDTH, False, FULL_REST)
        b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision="ieee")
        b_dp = tl.dot(b_g1, tl.trans(b_v1), b_dp, input_precision="ieee")
    b_s = tl.where(pixel[:, None] == pixel[None, :], b_s * SCALE, float("-inf"))
    b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
    b_p *= (1.0 / tl.sum(b_p, 1))[:, None]
    b_ds = b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None])
    b_ds = (b_ds * (SCALE * 0.6931471805599453)).to(q.dtype.element_ty)  # SCALE without log2 e
    b_p = b_p.to(grad.dtype.element_ty)

    b_dq0 = tl.dot(b_ds, b_k0, input_precision="ieee")
    store_rows(dq, b_dq0.to(dq.dtype.element_ty), o_out, o_0, m_row, WIDTH)
    b_dk0 = tl.dot(tl.trans(b_ds), b_q0, input_precision="ieee")
    store_rows(dk, b_dk0.to(dk.dtype.element_ty), o_out, o_0, m_row, WIDTH)
    b_dv0 = tl.dot(tl.trans(b_p), b_g0, input_precision="ieee")
    store_rows(dv, b_dv0.to(dv.dtype.element_ty), o_out, o_0, m_row, WIDTH)
    if REST:
        b_dq1 = tl.dot(b_ds, b_k1, input_precision="ieee")
        store_rows(dq, b_dq1.to(dq.dtype.element_ty), o_out, o_1, m_row, WIDTH)
        b_dk1 = tl.dot(tl.trans(b_ds), b_q1, input_precision="ieee")
        store_rows(dk, b_dk1.to(dk.dtype.element_ty), o_out, o_1, m_row, WIDTH)
        b_dv1 = tl.dot(tl.trans(b_p), b_g1, input_precision="ieee")
        store_rows(dv, b_dv1.to(dv.dtype.element_ty), o_out, o_1, m_row, WIDTH)


def warps(rows: int, itemsize: int = 2) -> int:
    """As few as hold the tile in registers."""
    return 4 if rows <= 32 and itemsize == 2 else 8


def launch(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (b f) n c from that of the result; contiguous, the same bits every time.

    For clips as long as `temporal.backward_fits` allows.
    """
    width = check_launch(q, k, v, heads)
    bf, n, _ = q.shape
    rows = temporal_backward_rows(frames, q.element_size())
    grad = grad.contiguous()
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    temporal_backward_kernel[(heads, triton.cdiv(n, rows // frames), bf // frames)](
        q, k, v, grad, n, *strides, dq, dk, dv,
        **constants(width, frames) | {"ROWS": rows}, num_warps=warps(rows, q.element_size()), num_stages=1,
    )  # fmt: skip
    return dq, dk, dv
