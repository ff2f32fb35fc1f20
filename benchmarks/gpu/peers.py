"""Sparse-causal attention as one would write it without our kernel, and what float64 says of either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from predict import Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tav_opt.kernels.naive import first_and_previous, split_heads

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Call = Callable[[], Any]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLEX_BLOCK = 128
"""Tokens of FlexAttention's blocks."""


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Fresh random q, k, v, (b f) n c."""
    size = (shape.b * shape.frames, shape.n, shape.heads * shape.width)
    return [torch.randn(size, device=device, dtype=dtype) for _ in range(3)]


def error(out: Tensor, qkv: list[Tensor], shape: Shape, *, temporal: bool = False, samples: int = 64) -> float:
    """The largest difference from float64 over random rows, as a share of what rounding may explain: wrong from 1 on.

    The weights and the result are rounded to the dtype once each, which is 2 × unit roundoff of the weighted |v|.
    """
    roundoff = torch.finfo(out.dtype).eps / 2
    q, k, v, out = (x.unflatten(0, (-1, shape.frames)).unflatten(-1, (shape.heads, -1)) for x in (*qkv, out))
    worst = 0.0
    for _ in range(samples):
        clip, i, p, head = (int(torch.randint(size, ())) for size in (shape.b, shape.frames, shape.n, shape.heads))
        at = (slice(None), p) if temporal else ([0, max(i - 1, 0)], slice(None))
        keys, values = (x[clip, :, :, head][at].reshape(-1, shape.width).double() for x in (k, v))
        weights = (keys @ q[clip, i, p, head].double() / shape.width**0.5).softmax(0)
        difference = (weights @ values - out[clip, i, p, head]).abs()
        share = difference / (2 * roundoff * (weights @ values.abs()) + 1e-5)
        worst = max(worst, share.nan_to_num(torch.inf).max().item())
    return worst


def peers(shape: Shape, qkv: list[Tensor]) -> Iterator[tuple[str, Call]]:
    """What to time against: the concatenation with each library, and two calls without one."""
    plain: Call = lambda: concatenated(*qkv, shape)  # noqa: E731
    if qkv[0].is_cuda:
        yield from ((f"concatenation + {name}", with_backend(backend, plain)) for name, backend in BACKENDS.items())
        for name, one in (("flash", _flash), ("cuDNN", _cudnn)):
            yield f"two calls of {name} and a merge", lambda one=one: merged(*qkv, shape, one)
    else:
        yield "concatenation + SDPA", plain
        yield "two calls and a merge", lambda: merged(*qkv, shape, _on_a_processor)


def concatenated(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """2n keys in memory, then a library's attention."""
    keys, values = first_and_previous(k, shape.frames), first_and_previous(v, shape.frames)
    out = F.scaled_dot_product_attention(*(split_heads(x, shape.heads) for x in (q, keys, values)))
    return out.transpose(1, 2).reshape(q.shape)


def with_backend(backend: SDPBackend, call: Call) -> Call:
    """The call with one backend of scaled_dot_product_attention."""

    def run() -> Any:
        with sdpa_kernel(backend):
            return call()

    return run


WithSum = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""q, k, v b heads n d → the attention, and the log-sum-exp of its scores b heads n."""


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, log_sum


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, log_sum.reshape(out.shape[:3])  # with a last axis of 1, by version


def _on_a_processor(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, log_sum


def merged(q: Tensor, k: Tensor, v: Tensor, shape: Shape, attention: WithSum) -> Tensor:
    """Frame 0 for all frames of a clip, the frame before for each, and their mean by the log-sum-exps: no copy of keys.

    The frame before is that of the row before; where that is another clip's, or frame 0 itself, it does not count.
    """

    def of_clips(x: Tensor, frames: int) -> Tensor:  # (b f) n c → b heads (f n) d, a view; or of frame 0 alone
        return split_heads(x.unflatten(0, (-1, shape.frames))[:, :frames].flatten(1, 2), shape.heads)

    first, first_sum = attention(of_clips(q, shape.frames), of_clips(k, 1), of_clips(v, 1))
    rows = [split_heads(x, shape.heads) for x in (q, k, v)]
    before, before_sum = attention(rows[0][1:], rows[1][:-1], rows[2][:-1])
    merge = _compiled_merge() if q.is_cuda else _merge
    by_row = first.unflatten(2, (shape.frames, -1)).transpose(1, 2).flatten(0, 1)  # (b f) heads n d
    sums = first_sum.unflatten(2, (shape.frames, -1)).transpose(1, 2).flatten(0, 1)
    return merge(by_row, sums, before, before_sum, shape.frames).transpose(1, 2).reshape(q.shape)


@cache
def _compiled_merge() -> Callable[..., Tensor]:
    return torch.compile(_merge, dynamic=False)


def _merge(first: Tensor, first_sum: Tensor, before: Tensor, before_sum: Tensor, frames: int) -> Tensor:
    counts = (torch.arange(1, len(first), device=first.device) % frames > 1)[:, None, None]
    share = torch.where(counts, torch.sigmoid(before_sum - first_sum[1:]), 0)[..., None]
    rest = torch.lerp(first[1:].float(), before.float(), share).to(first.dtype)
    return torch.cat([first[:1], rest])


def flex(shape: Shape, qkv: list[Tensor]) -> Call:
    """FlexAttention over each clip's f·n tokens, by the blocks of frames 0 and i-1; n is a multiple of a block."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False) if qkv[0].is_cuda else flex_attention
    tokens = shape.frames * shape.n
    blocks = flex_blocks(shape, qkv[0].device)
    q, k, v = (split_heads(x.reshape(shape.b, tokens, -1), shape.heads) for x in qkv)
    return lambda: attend(q, k, v, block_mask=blocks).transpose(1, 2).reshape(qkv[0].shape)


def flex_blocks(shape: Shape, device: torch.device) -> BlockMask:
    """All blocks whole, named by number: a mask of (f n)² values would not fit the card."""

    from torch.nn.attention.flex_attention import BlockMask

    def allowed(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        frame, source = query // shape.n, key // shape.n
        return (source == 0) | (source == frame - 1)

    a_frame = shape.n // FLEX_BLOCK
    frame = torch.arange(shape.frames * a_frame, device=device, dtype=torch.int32) // a_frame
    steps = torch.arange(shape.frames * a_frame, device=device, dtype=torch.int32)
    previous = (frame - 1).clamp(min=0)[:, None] * a_frame
    # The first a_frame numbers are frame 0's blocks, then those of the frame before; what follows is not read.
    numbers = torch.where(steps < a_frame, steps, previous + (steps - a_frame).clamp(max=a_frame - 1))
    count = torch.where(frame < 2, a_frame, 2 * a_frame).to(torch.int32)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count)[None, None],
        torch.zeros_like(numbers)[None, None],
        count[None, None],
        numbers[None, None].to(torch.int32),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=allowed,
        seq_lengths=(shape.frames * shape.n,) * 2,
    )
