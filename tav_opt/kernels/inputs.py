"""What the kernels ask of their inputs, and how they cut a head's width into powers of two."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

from torch import Tensor

from tav_opt.config import InputError

MIN_DOT = 16  # values along the shortest side of a matrix instruction's tile
LOG2_E = math.log2(math.e)


class Split(NamedTuple):
    """A head's width as `head` + `rest` values, each a power of two or `rest` zero; `rest` may reach past the width."""

    head: int
    rest: int


def split_width(width: int) -> Split:
    """40 → 32 + 16, 80 → 64 + 16, 160 → 128 + 32; a single power of two where two parts would save nothing."""
    single = max(MIN_DOT, 1 << (width - 1).bit_length())
    head = single // 2
    if head < MIN_DOT or width <= head:
        return Split(single, 0)
    rest = max(MIN_DOT, 1 << (width - head - 1).bit_length())
    return Split(single, 0) if head + rest >= single else Split(head, rest)


def temporal_backward_rows(frames: int, itemsize: int) -> int:
    """Rows of a tile of the temporal backward, which holds all frames of a pixel.

    In half precision 32 at least, half of what the forward takes: there are the operands of five products to hold.
    """
    return max(32 if itemsize == 2 else 16, 1 << (frames - 1).bit_length())


def check(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> None:
    """Raises InputError unless q, k, v are (b f) n c of one shape, dtype and device, and f and the heads divide it."""
    if q.ndim != 3 or not q.shape == k.shape == v.shape:
        raise InputError(f"q, k, v: three equal shapes (b f) n c, not {[tuple(x.shape) for x in (q, k, v)]}")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise InputError(f"q, k, v: one dtype and device, not {[(str(x.dtype), str(x.device)) for x in (q, k, v)]}")
    if frames < 1 or q.shape[0] % frames:
        raise InputError(f"frames = {frames}: must divide the {q.shape[0]} rows of q")
    if heads < 1 or q.shape[2] % heads:
        raise InputError(f"heads = {heads}: must divide the {q.shape[2]} channels of q")


def check_launch(q: Tensor, k: Tensor, v: Tensor, heads: int) -> int:
    """The head width, or InputError where the compiled kernels cannot take these tensors."""
    width = q.shape[2] // heads
    if not 4 <= width <= 256:
        raise InputError(f"head width {width}: the kernels take 4 to 256")
    if str(q.dtype) not in ("torch.float16", "torch.bfloat16", "torch.float32"):
        raise InputError(f"dtype {q.dtype}: the kernels take float16, bfloat16, float32")
    if any(x.stride(2) != 1 for x in (q, k, v)):
        raise InputError(f"q, k, v: the last dimension must be contiguous, strides {[x.stride() for x in (q, k, v)]}")
    return width


def on_kernel(x: Tensor) -> bool:
    """Whether the Triton kernel runs on x: on CUDA, or anywhere in Triton's interpreter (tests)."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
