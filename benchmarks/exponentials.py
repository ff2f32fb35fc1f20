"""The rate of exponentials that a GPU reaches, in registers: the limit of attention with narrow heads."""

from __future__ import annotations

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl

ROUNDS, PROGRAMS, VALUES = 512, 4096, 4096


@triton.jit
def exponentials_kernel(out, ROUNDS: tl.constexpr, VALUES: tl.constexpr):
    """ROUNDS dependent exponentials on each of VALUES values: x ← 2^(-x) stays within (0, 1]."""
    at = tl.arange(0, VALUES)
    x = at.to(tl.float32) / VALUES
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * VALUES + at, x)


def rate() -> float:
    """Exponentials a second."""
    out = torch.empty(PROGRAMS * VALUES, device="cuda")
    call = lambda: exponentials_kernel[(PROGRAMS,)](out, ROUNDS, VALUES, num_warps=8)  # noqa: E731
    milliseconds = triton.testing.do_bench(call, return_mode="median")
    return ROUNDS * PROGRAMS * VALUES / (milliseconds / 1e3)
