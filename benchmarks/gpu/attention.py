"""Sparse-causal and temporal attention against everything else one could call, at Stable Diffusion 1.5's shapes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from common import Timing, timed
from peers import FLEX_BLOCK, Call, error, flex, inputs, peers
from predict import SD15, Shape
from report import Report
from torch import Tensor

from tav_opt.config import first_line
from tav_opt.kernels.naive import first_and_previous
from tav_opt.kernels.naive import temporal_attention as transposed_temporal
from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention

DRY = (
    Shape(b=2, frames=4, n=128, heads=2, width=40),
    Shape(b=1, frames=3, n=36, heads=1, width=16),
)
FLEX_FRAMES = 24
"""FlexAttention compiles for long, and is measured last and at the shorter clips only."""


@torch.no_grad()
def attention(report: Report) -> None:
    """Each shape: parity with float64, then times; ours over each peer that is right."""
    torch.manual_seed(0)
    shapes = DRY if report.dry else SD15
    if not report.dry:
        report.figures("what the card reaches a second", limits())
    ours = {shape: _one_shape(report, shape) for shape in shapes}
    for shape, seconds in ours.items():
        if report.dry or shape.frames == FLEX_FRAMES:
            _flex(report, shape, seconds)


def _one_shape(report: Report, shape: Shape) -> float | None:
    """Rows of every candidate but FlexAttention → seconds of ours, None where it is wrong."""
    qkv, name = inputs(shape, report.device, report.dtype), title(shape)
    found = {}
    for peer, call in peers(shape, qkv):
        found[peer] = _peer(report, f"{name}: {peer}", call, qkv, shape)
    both: Call = lambda: [first_and_previous(x, shape.frames) for x in qkv[1:]]  # noqa: E731
    report.row(f"{name}: the concatenation alone", **milliseconds(measure(both)))
    _temporal(report, shape, qkv)
    call = partial(sparse_causal_attention, *qkv, shape.frames, shape.heads)
    wrong = error(call(), qkv, shape)
    if wrong >= 1:
        report.fault(f"{name}: ours", f"wrong by {wrong:.2g} × what rounding explains: not timed")
        return None
    timing, peak = measure(call), peak_mib(call)
    right = {peer: seconds for peer, seconds in found.items() if seconds is not None}
    gains = {f"× {peer}": seconds / timing.median for peer, seconds in right.items()}
    if right:
        gains["× the best peer"] = min(right.values()) / timing.median
    rate = {"tflop/s": shape.flops / timing.median / 1e12}
    report.figures(f"{name}: ours", milliseconds(timing) | {"error": wrong, "peak MiB": peak} | rate | gains)
    return timing.median


def _peer(report: Report, name: str, call: Call, qkv: list[Tensor], shape: Shape) -> float | None:
    """A peer's row → its seconds; None for one that does not run here, or is wrong: it is said, and ends nothing."""
    try:
        wrong = error(call(), qkv, shape)
        if wrong >= 1:
            report.left_out(name, f"wrong by {wrong:.2g} × what rounding explains")
            return None
        timing, peak = measure(call), peak_mib(call)
    except Exception as refused:  # a library says in its own way that it does not take a shape
        report.left_out(name, first_line(refused)[:200])
        return None
    report.figures(name, milliseconds(timing) | {"error": wrong, "peak MiB": peak})
    return timing.median


def _flex(report: Report, shape: Shape, ours: float | None) -> None:
    name = f"{title(shape)}: FlexAttention"
    if shape.n % FLEX_BLOCK:
        report.left_out(name, f"{shape.n} tokens are no multiple of its blocks of {FLEX_BLOCK}")
        return
    qkv = inputs(shape, report.device, report.dtype)
    try:
        call = flex(shape, qkv)
    except Exception as refused:
        report.left_out(name, first_line(refused)[:200])
        return
    seconds = _peer(report, name, call, qkv, shape)
    if seconds is not None and ours is not None:
        report.figures(f"{title(shape)}: ours over FlexAttention", {"×": seconds / ours})


def _temporal(report: Report, shape: Shape, qkv: list[Tensor]) -> None:
    """Attention over frames, in place and by transposition."""
    seconds = {}
    for name, attend in (("transposed + SDPA", transposed_temporal), ("ours", temporal_attention)):
        call = partial(attend, *qkv, shape.frames, shape.heads)
        wrong = error(call(), qkv, shape, temporal=True)
        if wrong >= 1:
            report.fault(f"{title(shape)}: temporal, {name}", f"wrong by {wrong:.2g} × what rounding explains")
            continue
        seconds[name] = measure(call)
        gain = {"× transposed": next(iter(seconds.values())).median / seconds[name].median} if name == "ours" else {}
        report.figures(f"{title(shape)}: temporal, {name}", milliseconds(seconds[name]) | {"error": wrong} | gain)


def measure(call: Call) -> Timing:
    """On a GPU by events around each call; on a processor by the clock."""
    if not torch.cuda.is_available():
        return timed("", call, calls=3)
    import triton

    median, p10, p90 = triton.testing.do_bench(call, warmup=25, rep=100, quantiles=[0.5, 0.1, 0.9])
    return Timing("", median / 1e3, p10 / 1e3, p90 / 1e3, calls=0)


def milliseconds(timing: Timing) -> dict[str, Any]:
    """As figures of a row."""
    return {"ms": timing.median * 1e3, "p10 ms": timing.p10 * 1e3, "p90 ms": timing.p90 * 1e3}


def peak_mib(call: Call) -> float:
    """Memory that a call takes beyond what is held before; 0 off CUDA, where nobody counts."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def limits() -> dict[str, float]:
    """What this card reaches a second: flops of a large fp16 product, bytes of a copy, exponentials."""
    from exponentials import rate

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    large = torch.randn(1 << 30, device="cuda", dtype=torch.float16)
    into = torch.empty_like(large)
    return {
        "flop": 2 * 8192**3 / measure(lambda: a @ b).median,
        "bytes": 2 * large.nbytes / measure(lambda: into.copy_(large)).median,
        "exponentials": rate(),
    }


def title(shape: Shape) -> str:
    """A shape in short: all have b = 2 and 8 heads."""
    return f"f {shape.frames}, n {shape.n}"
