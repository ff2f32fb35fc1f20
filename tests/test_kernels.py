"""The attention ops on a CPU: their numbers, gradients and traces, with and without Triton installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tav_opt.config import InputError
from tav_opt.kernels.inputs import split_width
from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention

ROOT = Path(__file__).parents[1]
OP = torch.ops.tav_opt.sparse_causal_attention.default
BOTH = pytest.mark.parametrize("attention", [sparse_causal_attention, temporal_attention], ids=["sparse", "temporal"])


def truth(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, attention) -> Tensor:
    """float64, one frame or pixel and one head at a time, keys materialised by plain indexing."""
    bf, n, c = q.shape
    d = c // heads
    q, k, v = (x.double().reshape(-1, frames, n, heads, d) for x in (q, k, v))
    out = torch.empty_like(q)
    for clip in range(bf // frames):
        for head in range(heads):
            if attention is sparse_causal_attention:
                queries = [(i, slice(None)) for i in range(frames)]
                keys = [([0, max(i - 1, 0)], slice(None)) for i in range(frames)]
            else:
                queries = keys = [(slice(None), p) for p in range(n)]
            for at, of in zip(queries, keys, strict=True):
                keyed, valued = (x[clip, ..., head, :][of].reshape(-1, d) for x in (k, v))
                scores = q[clip, ..., head, :][at] @ keyed.T / d**0.5
                out[clip, ..., head, :][at] = scores.softmax(-1) @ valued
    return out.reshape(bf, n, c)


def inputs(b: int, f: int, n: int, heads: int, d: int, **kind) -> tuple[Tensor, ...]:
    """q, k, v as slices of one fused projection."""
    torch.manual_seed(0)
    return torch.randn(b * f, n, 3 * heads * d, **kind).chunk(3, -1)


@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 4), (2, 2, 5, 2, 8), (1, 3, 7, 2, 40), (3, 4, 9, 1, 5)])
@pytest.mark.parametrize("gradients", [True, False])
def test_equals_float64(attention, shape, gradients):
    q, k, v = inputs(*shape)
    with torch.set_grad_enabled(gradients):
        out = attention(q, k, v, shape[1], shape[3])
    assert out.shape == q.shape
    assert (out - truth(q, k, v, shape[1], shape[3], attention)).abs().max() < 1e-5


@BOTH
def test_gradients_equal_float64(attention):
    q, k, v = (x.detach().requires_grad_() for x in inputs(2, 3, 6, 2, 4))
    grad = torch.randn_like(q)
    expected = torch.autograd.grad(truth(q, k, v, 3, 2, attention), (q, k, v), grad.double())
    found = torch.autograd.grad(attention(q, k, v, 3, 2), (q, k, v), grad)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(found, expected, strict=True))
    again = torch.autograd.grad(checkpoint(attention, q, k, v, 3, 2, use_reentrant=False), (q, k, v), grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "checkpointing changed a gradient"


@pytest.mark.parametrize("name", ["sparse_causal_attention", "temporal_attention"])
def test_opcheck(name):
    q, k, v = (x.clone().requires_grad_() for x in inputs(2, 3, 6, 2, 4))
    torch.library.opcheck(getattr(torch.ops.tav_opt, name).default, (q, k, v, 3, 2))


def test_the_backward_of_the_op_is_the_twins_and_repeats_on_two_threads():
    q, k, v = (x.detach().requires_grad_() for x in inputs(2, 4, 64, 2, 8))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [torch.autograd.grad(OP(q, k, v, 4, 2).square().sum(), (q, k, v)) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    expected = torch.autograd.grad(sparse_causal_attention(q, k, v, 4, 2).square().sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(runs[0], expected, strict=True))


class Both(torch.nn.Module):
    """Two attentions of three frames, two heads."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + sparse_causal_attention(x, x + 1, x, 3, 2)
        return x + temporal_attention(x, x, x + 1, 3, 2)


class Sparse(torch.nn.Module):
    """One sparse-causal attention of three frames, two heads."""

    def forward(self, x: Tensor) -> Tensor:
        return x + sparse_causal_attention(x, x + 1, x, 3, 2)


# PyTorch guards the standard operators of temporal attention against the batch 1 that it was not traced with.
@pytest.mark.parametrize("module, rows", [(Sparse(), (3, 12)), (Both(), (6, 12))], ids=["sparse", "both"])
def test_export_keeps_one_opaque_node_with_a_dynamic_batch(module, rows):
    b = torch.export.Dim("b", min=1, max=8)
    program = torch.export.export(module, (torch.randn(6, 5, 8),), dynamic_shapes=({0: 3 * b},))
    for graph in (program, program.run_decompositions()):
        targets = [node.target for node in graph.graph.nodes]
        assert targets.count(OP) == 1
        assert torch.ops.tav_opt.temporal_attention.default not in targets, "exporters know standard operators alone"
    for count in rows:
        x = torch.randn(count, 5, 8)
        assert torch.allclose(program.module()(x), module(x), atol=1e-6)


def test_compile_traces_the_whole_forward_and_backward():
    compiled = torch.compile(Both(), backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 5, 8, requires_grad=True)
    (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(Both()(x).square().sum(), x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shapes, frames, heads, word",
    [
        (((4, 5, 8), (4, 6, 8), (4, 6, 8)), 2, 2, "three equal shapes"),
        (((4, 5, 8),) * 3, 3, 2, "frames = 3"),
        (((4, 5, 8),) * 3, 2, 3, "heads = 3"),
    ],
)
def test_refusals(shapes, frames, heads, word):
    with torch.no_grad(), pytest.raises(InputError, match=word):
        sparse_causal_attention(*(torch.randn(shape) for shape in shapes), frames, heads)


def test_works_where_triton_is_not_installed():
    code = """
import sys; sys.modules['triton'] = None
import torch
from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention
x = torch.randn(6, 5, 8)
with torch.no_grad():
    assert sparse_causal_attention(x, x, x, 3, 2).shape == temporal_attention(x, x, x, 3, 2).shape == x.shape
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("width", range(4, 257))
def test_widths_split_into_powers_of_two(width):
    head, rest = split_width(width)
    single = 1 << max(4, (width - 1).bit_length())
    assert all(part >= 16 and part & (part - 1) == 0 for part in (head, rest) if part)
    assert width <= head + rest <= single


def test_widths_of_stable_diffusion():
    assert [tuple(split_width(width)) for width in (40, 80, 160, 64)] == [(32, 16), (64, 16), (128, 32), (64, 0)]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's own process")
@pytest.mark.parametrize("marked", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_interpreted_kernels(marked):
    """Triton interprets or compiles for a whole process: the interpreted kernels have one of their own."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-m", marked, "tests/test_kernels_interpreted.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # its products are too small for threads
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
