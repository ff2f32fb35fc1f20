"""The backward's Triton kernels in Triton's interpreter, on CPU tensors; test_kernels_backward.py starts this file."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import Both, truth
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from test_kernels_interpreted import BOTH, inputs, poisoned_allocations, products_of_bfloat16  # noqa: F401
from triton.runtime.interpreter import InterpretedFunction

from tav_opt import kernels
from tav_opt.kernels import autotune, flash_backward, sparse_causal_backward, sparse_causal_kernel, tiles
from tav_opt.kernels.group_norm import group_norm
from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention
from tav_opt.kernels.tiles import Tile

OPS = torch.ops.tav_opt
ROOT = Path(__file__).parents[1]
FRAMES, TOKENS, WIDTHS = (1, 2, 3, 5), (1, 17, 32, 33), (8, 40, 80, 160)
# A Latin square: every pair of values of any two of the three occurs; the batch alternates.
PAIRWISE = [(1 + (i + j) % 2, FRAMES[i], TOKENS[j], 1, WIDTHS[(i + j) % 4]) for i in range(4) for j in range(4)]
SHAPES = [*PAIRWISE, (1, 3, 9, 3, 20), (1, 3, 10, 1, 256)]


def of_names(shape: tuple[int, ...]) -> str:
    return "b{}-f{}-n{}-heads{}-d{}".format(*shape)


def expected(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, frames: int, heads: int, attention) -> tuple[Tensor, ...]:
    """float64 autograd through plain indexing."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    return torch.autograd.grad(truth(q, k, v, frames, heads, attention), (q, k, v), grad.double())


def found(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, frames: int, heads: int, attention) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return torch.autograd.grad(attention(q, k, v, frames, heads), (q, k, v), grad)


def gradient(q: Tensor) -> Tensor:
    """Of the result, not contiguous, NaN beside."""
    bf, n, c = q.shape
    wide = torch.full((bf, n, c + 3), float("nan"), dtype=q.dtype)
    wide[..., :c] = torch.randn(bf, n, c)
    return wide[..., :c]


def largest(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """The largest absolute difference; NaN counts as infinite."""
    return max((x - y).abs().nan_to_num(torch.inf).max().item() for x, y in zip(a, b, strict=True))


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=of_names)
def test_equals_float64(attention, shape):
    q, k, v = inputs(*shape)
    grad = gradient(q)
    sizes = shape[1], shape[3], attention
    error = largest(found(q, k, v, grad, *sizes), expected(q, k, v, grad, *sizes))
    assert error < 5e-6, f"largest absolute error {error:.1e}"


def kept(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> tuple[Tensor, Tensor]:
    """The forward's result and log-sum-exp."""
    return sparse_causal_kernel.launch_with_lse(q, k, v, frames, heads)


@pytest.mark.parametrize("shape", [(2, 3, 33, 1, 40), (1, 2, 16, 1, 16), (1, 1, 5, 1, 80)], ids=of_names)
def test_the_log_sum_exp_is_that_of_one_copy_of_frame_0_for_frames_0_and_1(shape):
    b, f, n, heads, d = shape
    q, k, v = inputs(*shape)
    out, lse = kept(q, k, v, f, heads)
    assert torch.equal(out, sparse_causal_attention(q, k, v, f, heads)), "asking for it changed the result"
    by_head = [x.double().reshape(b, f, n, heads, d).transpose(2, 3) for x in (q, k)]
    for i in range(f):
        keys = torch.cat([by_head[1][:, j] for j in {0, max(i - 1, 0)}], 2)
        scores = by_head[0][:, i] @ keys.transpose(2, 3) / d**0.5
        assert (lse.unflatten(0, (b, f))[:, i] - scores.logsumexp(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("tile", [Tile(16, 32, 4, 1), Tile(64, 16, 4, 2), Tile(32, 64, 8, 2)], ids=str)
@pytest.mark.parametrize("n", [64, 37])
def test_every_tile_gives_the_same_gradients(tile, n):
    q, k, v = inputs(1, 3, n, 1, 40)
    grad = gradient(q)
    out, lse = kept(q, k, v, 3, 1)
    results = sparse_causal_backward.launch(grad, q, k, v, out, lse, 3, 1, tiles=(tile, tile))
    assert largest(results, expected(q, k, v, grad, 3, 1, sparse_causal_attention)) < 5e-6


@BOTH
def test_the_same_bits_twice(attention):
    q, k, v = inputs(1, 4, 20, 1, 8)
    grad = gradient(q)
    runs = [found(q, k, v, grad, 4, 1, attention) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    again = torch.autograd.grad(checkpoint(attention, q, k, v, 4, 1, use_reentrant=False), (q, k, v), grad)
    assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True)), "checkpointing changed a gradient"


@pytest.mark.parametrize("frames_at_once", [1, 2, 4])
def test_partial_sums_keep_to_their_bytes(frames_at_once, monkeypatch):
    """Five frames in groups of one, two, four and what is left: the first group has no previous frames at one."""
    b, f, n, c = 2, 5, 9, 8
    sizes, plain = [], torch.empty

    def empty(*shape, **options):
        sizes.append(torch.Size(shape[0] if len(shape) == 1 else shape).numel() * 4)
        return plain(*shape, **options)

    q, k, v = inputs(b, f, n, 1, 8)
    grad, (out, lse) = gradient(q), kept(q, k, v, f, 1)
    monkeypatch.setattr(sparse_causal_backward, "PARTIALS", 8 * b * n * c * frames_at_once + 7)
    with monkeypatch.context() as patch:
        patch.setattr(sparse_causal_backward.torch, "empty", empty)
        results = sparse_causal_backward.launch(grad, q, k, v, out, lse, f, 1)
    assert largest(results, expected(q, k, v, grad, f, 1, sparse_causal_attention)) < 5e-6
    partials = [size for size in sizes if size != q.numel() * 4]  # beside dq, dk, dv
    assert len(partials) == -(-f // frames_at_once) and max(partials) == 8 * b * n * c * frames_at_once


@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 2, 1, 4), (1, 3, 2, 1, 4)], ids=of_names)
def test_differences_of_float64(attention, shape):
    """No autograd at all: what a small step along a random direction changes."""
    q, k, v = inputs(*shape)
    grad, step = gradient(q), 1e-5
    for _ in range(3):
        directions = [torch.randn(q.shape, dtype=torch.float64) for _ in range(3)]
        ends = [[x.double() + sign * step * d for x, d in zip((q, k, v), directions, strict=True)] for sign in (1, -1)]
        above, below = ((truth(*end, shape[1], shape[3], attention) * grad).sum() for end in ends)
        slope = sum(
            (g * d).sum() for g, d in zip(found(q, k, v, grad, shape[1], shape[3], attention), directions, strict=True)
        )
        assert abs((above - below) / (2 * step) - slope) < 1e-5


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", [(1, 3, 70, 1, 40), (1, 4, 33, 1, 80)], ids=of_names)
def test_half_precisions(attention, dtype, shape):
    """Weights, their gradients and the results are rounded once each: the square root of 3 roundings in the mean.

    The interpreter truncates to bfloat16 where a GPU rounds to nearest: twice the roundoff, all to one side.
    """
    q, k, v = inputs(*shape, dtype)
    grad = gradient(q)
    sizes = shape[1], shape[3], attention
    for a, b in zip(found(q, k, v, grad, *sizes), expected(q, k, v, grad, *sizes), strict=True):
        assert a.dtype == dtype
        error = ((a - b).square().mean() / b.square().mean()).sqrt().item()
        allowed = torch.finfo(dtype).eps * (3 if dtype == torch.bfloat16 else 1)
        assert error < allowed, f"{error / allowed:.2f} × what rounding explains"


@BOTH
def test_extreme_logits(attention):
    """Logits of ±1e4: finite; the largest key decides, and gradients of queries and keys vanish."""
    q, k, v = inputs(1, 3, 20, 1, 40)
    q.mul_(100), k.mul_(100)
    grad = gradient(q)
    results = found(q, k, v, grad, 3, 1, attention)
    assert all(x.isfinite().all() for x in results)
    assert (results[2] - expected(q, k, v, grad, 3, 1, attention)[2]).abs().max() < 2e-2


@BOTH
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # in rows that are never stored
def test_scores_all_far_below_zero(attention):
    """Where a weight of a score of zero, as of rows past the frame's end, would be infinite."""
    q, k, v = inputs(1, 3, 20, 1, 40)
    q.abs_().mul_(8), k.abs_().mul_(-8)
    grad = gradient(q)
    assert (q[0] @ k[0].T / 40**0.5).max() < -100
    results, exact = found(q, k, v, grad, 3, 1, attention), expected(q, k, v, grad, 3, 1, attention)
    for a, b in zip(results, exact, strict=True):
        assert (a - b).norm() / b.norm() < 1e-3


def test_no_log_sum_exp_without_gradients(monkeypatch):
    def refused(*_):
        raise AssertionError("asked for")

    q, k, v = inputs(1, 2, 4, 1, 8)
    monkeypatch.setattr(sparse_causal_kernel, "launch_with_lse", refused)
    sparse_causal_attention(q, k, v, 2, 1)
    with torch.no_grad():
        sparse_causal_attention(q.detach().requires_grad_(), k, v, 2, 1)
    with pytest.raises(AssertionError, match="asked for"):
        sparse_causal_attention(q, k.detach().requires_grad_(), v, 2, 1)


def test_the_op_without_log_sum_exp_has_the_same_gradients():
    q, k, v = inputs(2, 3, 6, 2, 4)
    grad = gradient(q)
    own = found(q, k, v, grad, 3, 2, OPS.sparse_causal_attention)
    assert all(map(torch.equal, own, found(q, k, v, grad, 3, 2, sparse_causal_attention)))


def test_the_log_sum_exp_carries_no_gradient():
    q, k, v = (x.detach().requires_grad_() for x in inputs(1, 2, 4, 1, 8))
    out, lse = OPS.sparse_causal_attention_with_lse(q, k, v, 2, 1)
    assert out.requires_grad and not lse.requires_grad


def test_the_table_chooses_the_backward(monkeypatch):
    """In half precision, which is all that PyTorch's kernel for CUDA takes."""
    q, k, v = inputs(1, 4, 20, 2, 8, torch.float16)
    grad = gradient(q)
    ours = found(q, k, v, grad, 4, 2, sparse_causal_attention)
    calls, plain = [], flash_backward.gradients
    monkeypatch.setattr(flash_backward, "gradients", lambda *given: calls.append(1) or plain(*given))
    assert not calls
    monkeypatch.setattr(tiles, "TABLE", tiles.TABLE._replace(backward={80: "triton", 90: "flash"}))
    two_calls = found(q, k, v, grad, 4, 2, sparse_causal_attention)
    assert len(calls) == 1 and largest(ours, two_calls) < 4e-3
    found(*(x.float() for x in (q, k, v, grad)), 4, 2, sparse_causal_attention)
    assert len(calls) == 1, "float32 has our kernels alone"


@pytest.mark.parametrize("name", ["sparse_causal_attention", "sparse_causal_attention_with_lse", "temporal_attention"])
def test_opcheck(name):
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs(1, 2, 3, 1, 4))
    torch.library.opcheck(getattr(OPS, name).default, (q, k, v, 2, 1))


def test_opcheck_of_the_backwards():
    q, k, v = (x.clone() for x in inputs(1, 2, 3, 1, 4))
    grad, (out, lse) = torch.randn(q.shape), kept(q, k, v, 2, 1)
    torch.library.opcheck(OPS.sparse_causal_attention_backward.default, (grad, q, k, v, out, lse, 2, 1))
    torch.library.opcheck(OPS.temporal_attention_backward.default, (grad, q, k, v, 2, 1))


def test_compile_traces_the_whole_forward_and_backward():
    compiled = torch.compile(Both(), backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5, 8, requires_grad=True)
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (eager,) = torch.autograd.grad(Both()(x).square().sum(), x)
    assert torch.allclose(ours, eager, rtol=1e-4, atol=1e-4)


def test_exports_know_the_one_op_even_with_gradients():
    class Sparse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return sparse_causal_attention(x * self.weight, x, x, 3, 2)

    program = torch.export.export(Sparse(), (torch.randn(6, 5, 8),))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(OPS.sparse_causal_attention.default) == 1
    assert OPS.sparse_causal_attention_with_lse.default not in targets


@pytest.mark.parametrize("frames, dtype, tolerance", [(33, torch.float32, 5e-6), (70, torch.float16, 4e-3)])
def test_long_clips_have_the_twins_gradients(frames, dtype, tolerance):
    """33 frames in float32 do not fit one tile of the forward, 70 in half precision none of the backward."""
    q, k, v = inputs(1, frames, 2, 1, 8, dtype)
    grad = gradient(q)
    sizes = frames, 1, temporal_attention
    assert largest(found(q, k, v, grad, *sizes), expected(q, k, v, grad, *sizes)) < tolerance


def test_autotuning_compares_every_kernel_with_the_twin(monkeypatch):
    """What it would time: with any tile each kernel, and each backward, gives the twin's numbers."""
    monkeypatch.setattr(autotune, "FRAMES", 3)
    monkeypatch.setattr(autotune, "HEADS", 1)
    monkeypatch.setattr(autotune, "CLIPS", 1)
    torch.manual_seed(0)
    tried, tile = autotune.trials(16, 40, "cpu"), Tile(32, 16, 4, 1)
    assert set(tried.kernels) == set(tiles.KERNELS) == set(autotune.CANDIDATES)
    for trial in tried.kernels.values():
        assert autotune.difference(trial.run(tile), trial.truth) < autotune.ALLOWED / 2
    for results in (tried.ours(tile, tile), tried.flash()):
        assert autotune.difference(results, tried.truth) < autotune.ALLOWED / 2


@pytest.fixture
def launched(monkeypatch) -> list[tuple[str, set[str], Tensor | None]]:
    """Of each launch of a kernel: its name, the names of its arguments that are given, what guards its device."""
    guards: list[Tensor | None] = [None]
    found: list[tuple[str, set[str], Tensor | None]] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        guards.append(x)
        yield
        guards.pop()

    def run(self, *args: Any, **options: Any) -> None:
        given = {name for name, value in zip(self.arg_names, args, strict=False) if value is not None}
        found.append((self.__name__, given, guards[-1]))
        return real(self, *args, **options)

    real = InterpretedFunction.run
    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return found


def all_kernels() -> set[str]:
    """Of the package; the functions that they are made of are named otherwise."""
    names = (module.name for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."))
    values = [value for module in map(importlib.import_module, names) for value in vars(module).values()]
    jitted = {value.__name__ for value in values if isinstance(value, InterpretedFunction)}
    return {name for name in jitted if name.endswith("_kernel")}


def test_the_smoke_test_of_a_card_launches_every_kernel(launched, monkeypatch):
    """Those of inference and of tuning; the forward both with and without the log-sum-exp."""
    for folder in ("benchmarks", "benchmarks/gpu"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import smoke

    monkeypatch.setattr(smoke, "SMALL", replace(smoke.SMALL, b=1, n=20, heads=1))
    monkeypatch.setattr(smoke, "SIZES", (smoke.SMALL.frames, 1))
    wrong = {name: error() for name, _, error in smoke.launches(torch.device("cpu"))}
    assert max(wrong.values()) < 1, wrong
    assert {name for name, *_ in launched} == all_kernels()
    lse = ["lse" in given for name, given, _ in launched if name == "sparse_causal_kernel"]
    assert sorted(lse) == [False, True]


@pytest.mark.parametrize("graded", [False, True], ids=["forward", "forward-and-backward"])
def test_kernels_launch_on_the_device_of_their_tensors(launched, graded):
    """Triton launches on the current device, whichever holds the tensors."""
    q, k, v = (x.detach().requires_grad_(graded) for x in inputs(1, 3, 5, 1, 16))
    x = torch.randn(3, 16, 2, 2, requires_grad=graded)
    weight, bias = (torch.randn(16, requires_grad=graded) for _ in range(2))
    calls = [(attention, (q, k, v), (3, 1)) for attention in (sparse_causal_attention, temporal_attention)]
    for function, tensors, sizes in (*calls, (group_norm, (x, weight, bias), (3, 4, 1e-5))):
        out = function(*tensors, *sizes)
        if graded:
            torch.autograd.grad(out.sum(), tensors)
    forward = {"sparse_causal_kernel", "temporal_kernel", "moments_kernel", "statistics_kernel", "normalize_kernel"}
    assert {name for name, *_ in launched} == (all_kernels() if graded else forward)
    assert [name for name, _, guard in launched if guard is None] == []
