"""The Triton kernels in Triton's interpreter, on CPU tensors; test_kernels.py starts this file's process."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from test_kernels import truth
from torch import Tensor

from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention

tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
BOTH = pytest.mark.parametrize("attention", [sparse_causal_attention, temporal_attention], ids=["sparse", "temporal"])
FRAMES, TOKENS, WIDTHS, BATCHES = (1, 2, 3, 8, 24), (1, 63, 64, 100, 128), (4, 40, 64, 80, 160), (1, 2, 3)
# Two orthogonal Latin squares: every pair of values of any two of the four occurs.
PAIRWISE = [
    (BATCHES[2 - (i + 2 * j) % 5 % 3], FRAMES[i], TOKENS[j], 1, WIDTHS[(i + j) % 5]) for i in range(5) for j in range(5)
]
WIDE = [(1, 3, 20, 1, 256), (1, 3, 20, 3, 20), (2, 2, 33, 2, 96), (1, 2, 130, 1, 17)]


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Memory from torch.empty holds NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch):
    """The interpreter multiplies the bit patterns of bfloat16 as integers (create_dot, Triton 3.9): decode them."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def decode(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *options):
        return plain(self, decode(a), decode(b), d, *options)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def inputs(b: int, f: int, n: int, heads: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v as slices of one fused projection, with NaN before, between and after: a read out of bounds shows."""
    torch.manual_seed(0)
    c = heads * d
    fused = torch.full((b * f, n + 3, 3 * (c + 2)), float("nan"), dtype=dtype)
    slices = [fused[:, 1 : n + 1, i * (c + 2) : i * (c + 2) + c] for i in range(3)]
    for x in slices:
        x.copy_(torch.randn(b * f, n, c))
    return slices


def test_every_pair_of_sizes_occurs():
    values = [(b, f, n, d) for b, f, n, _, d in PAIRWISE]
    sets = (BATCHES, FRAMES, TOKENS, WIDTHS)
    for i in range(4):
        for j in range(i):
            assert {(v[i], v[j]) for v in values} == {(x, y) for x in sets[i] for y in sets[j]}


@BOTH
@pytest.mark.parametrize("shape", PAIRWISE + WIDE, ids=lambda s: "b{}-f{}-n{}-heads{}-d{}".format(*s))
def test_equals_float64(attention, shape):
    q, k, v = inputs(*shape)
    out = attention(q, k, v, shape[1], shape[3])
    error = (out - truth(q, k, v, shape[1], shape[3], attention)).abs().max().item()
    assert error < 1e-5, f"largest absolute error {error:.1e}"


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", [(2, 3, 70, 2, 40), (1, 3, 64, 1, 80)])
def test_half_precisions(attention, dtype, shape):
    """The weights and the result are rounded once each: 2 × unit roundoff of the weighted |v|.

    The interpreter truncates to bfloat16 (measured: every error is downwards, up to one unit in the last place), a GPU
    rounds to nearest: twice the roundoff here, and the tighter bound in test_kernels_gpu.py.
    """
    q, k, v = inputs(*shape, dtype)
    out = attention(q, k, v, shape[1], shape[3])
    assert out.dtype == dtype
    difference = (out - truth(q, k, v, shape[1], shape[3], attention)).abs()
    roundoff = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 0.5)
    allowed = 2 * roundoff * truth(q, k, v.abs(), shape[1], shape[3], attention) + 1e-5
    assert (difference < allowed).all(), f"{(difference / allowed).max():.2f} × what rounding explains"


@BOTH
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits(attention, sign):
    """Logits of ±1e4 and more: finite, and equal to float64, which the largest key decides."""
    q, k, v = inputs(1, 3, 70, 2, 40)
    q.mul_(100), k.mul_(100 * sign)
    out = attention(q, k, v, 3, 2)
    assert (q[0].double() @ k[0].double().T).abs().max() / 40**0.5 > 1e4
    assert out.isfinite().all()
    assert (out - truth(q, k, v, 3, 2, attention)).abs().max() < 2e-2


@BOTH
def test_gradients(attention):
    q, k, v = (x.requires_grad_() for x in inputs(1, 3, 20, 2, 8))
    grad = torch.randn(3, 20, 16)
    found = torch.autograd.grad(attention(q, k, v, 3, 2), (q, k, v), grad)
    expected = torch.autograd.grad(truth(q, k, v, 3, 2, attention), (q, k, v), grad.double())
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(found, expected, strict=True))


def test_long_clips():
    """Up to 32 frames in float32 and 128 in half precision are one tile; a longer clip takes standard operators."""
    for frames, dtype, tolerance in ((32, torch.float32, 1e-5), (33, torch.float32, 1e-5), (100, torch.float16, 2e-3)):
        q, k, v = inputs(1, frames, 3, 1, 40, dtype)
        out = temporal_attention(q, k, v, frames, 1)
        assert (out - truth(q, k, v, frames, 1, temporal_attention)).abs().max() < tolerance


def test_a_head_that_does_not_fit_is_refused():
    q, k, v = inputs(1, 2, 4, 1, 320)
    with pytest.raises(ValueError, match="head width 320"):
        sparse_causal_attention(q, k, v, 2, 1)


@pytest.mark.parametrize("case", [pytest.param(i, marks=[pytest.mark.full] * (i < 3)) for i in range(4)])
def test_the_unet_equals_the_reference(golden, tensors, case, monkeypatch):
    """Its norms by kernels too, but for the one that always runs: test_group_norm_interpreted.py has them."""
    from tav_opt.kernels import naive
    from tav_opt.models import load_video_unet

    if case == 3:
        monkeypatch.setattr("tav_opt.unet.group_norm", naive.group_norm)
        monkeypatch.setattr("tav_opt.unet.on_kernel", lambda _: False)
    torch.use_deterministic_algorithms(False)
    unet = load_video_unet(golden / "unet_sd1" / "unet3d")
    with torch.no_grad():
        noise = unet(*(tensors[f"forward{case}.{name}"] for name in ("sample", "timestep", "text")))
    error = (noise - tensors[f"forward{case}.output"]).abs().max().item()
    assert error < 1e-5, f"case {case}: largest absolute error {error:.1e}"
