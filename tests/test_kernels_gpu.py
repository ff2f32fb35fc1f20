"""The kernels on a GPU: parity with float64, CUDA graphs, and the PTX as TensorRT launches it."""

from __future__ import annotations

import ctypes

import pytest
import torch
from test_kernels import truth

from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BOTH = pytest.mark.parametrize("attention", [sparse_causal_attention, temporal_attention], ids=["sparse", "temporal"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
SHAPES = [(2, 3, 64, 2, 40), (1, 8, 63, 2, 80), (3, 2, 100, 1, 160), (1, 24, 256, 2, 64), (1, 1, 1, 1, 4)]
SHAPES += [(1, 3, 70, 1, 256), (1, 2, 4096, 1, 40), (1, 3, 33, 1, 96)]


def inputs(b: int, f: int, n: int, heads: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return list(torch.randn(b * f, n, 3 * heads * d, device="cuda", dtype=dtype).chunk(3, -1))


def compare(out: torch.Tensor, q, k, v, frames: int, heads: int, attention) -> None:
    """The weights and the result are rounded to nearest once each: 2 × unit roundoff of the weighted |v|."""
    q, k, v = (x.cpu() for x in (q, k, v))
    difference = (out.cpu() - truth(q, k, v, frames, heads, attention)).abs()
    allowed = torch.finfo(q.dtype).eps * truth(q, k, v.abs(), frames, heads, attention) + 1e-5
    assert (difference < allowed).all(), f"{(difference / allowed).max():.2f} × what rounding explains"


@BOTH
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-f{}-n{}-heads{}-d{}".format(*s))
def test_equals_float64(attention, dtype, shape):
    q, k, v = inputs(*shape, dtype)
    with torch.no_grad():
        compare(attention(q, k, v, shape[1], shape[3]), q, k, v, shape[1], shape[3], attention)


@BOTH
def test_replays_in_a_cuda_graph(attention):
    q, k, v = inputs(1, 3, 64, 2, 40, torch.float16)
    with torch.no_grad():
        attention(q, k, v, 3, 2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(q, k, v, 3, 2)
        q.copy_(torch.randn_like(q))
        graph.replay()
    compare(out, q, k, v, 3, 2, attention)


def gradients(attention, q, k, v, grad, frames: int, heads: int) -> tuple[torch.Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return torch.autograd.grad(attention(q, k, v, frames, heads), (q, k, v), grad)


def compare_gradients(found, q, k, v, grad, frames: int, heads: int, attention) -> None:
    """Weights, their gradients and the results are rounded once each: less than 2 × unit roundoff in the mean."""
    q, k, v = (x.cpu().double().requires_grad_() for x in (q, k, v))
    expected = torch.autograd.grad(truth(q, k, v, frames, heads, attention), (q, k, v), grad.cpu().double())
    for a, b in zip(found, expected, strict=True):
        difference = (a.cpu() - b).norm() / b.norm().clamp(min=1e-12) if b.any() else a.cpu().norm()
        allowed = torch.finfo(a.dtype).eps + 1e-5
        assert difference < allowed, f"{difference / allowed:.2f} × what rounding explains"


@BOTH
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-f{}-n{}-heads{}-d{}".format(*s))
def test_gradients(attention, dtype, shape):
    """By our kernels, twice with the same bits."""
    q, k, v = inputs(*shape, dtype)
    grad = torch.randn_like(q)
    found, again = (gradients(attention, q, k, v, grad, shape[1], shape[3]) for _ in range(2))
    assert all(map(torch.equal, found, again))
    compare_gradients(found, q, k, v, grad, shape[1], shape[3], attention)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-f{}-n{}-heads{}-d{}".format(*s))
def test_gradients_by_two_calls(dtype, shape, monkeypatch):
    from tav_opt.kernels import flash_backward, tiles

    q, k, v = inputs(*shape, dtype)
    if not flash_backward.fits(q, shape[3]):
        pytest.skip("a width that flash attention does not take")
    monkeypatch.setattr(tiles, "TABLE", tiles.TABLE._replace(backward={0: "flash"}))
    grad = torch.randn_like(q)
    found = gradients(sparse_causal_attention, q, k, v, grad, shape[1], shape[3])
    compare_gradients(found, q, k, v, grad, shape[1], shape[3], sparse_causal_attention)


def launch_by_driver(launch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """Exactly TensorRT's argument list: input pointers, int32 scalars, output pointers."""
    cuda = ctypes.CDLL("libcuda.so.1")

    def must(status: int) -> None:
        assert status == 0, f"CUDA driver error {status}"

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    must(cuda.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(launch.code.ptx.encode())))
    must(cuda.cuModuleGetFunction(ctypes.byref(function), module, launch.code.entry.encode()))
    if launch.code.shared > 48 * 1024:
        must(cuda.cuFuncSetAttribute(function, 8, launch.code.shared))  # MAX_DYNAMIC_SHARED_SIZE_BYTES
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, out)]
    values = [*pointers[:3], *(ctypes.c_int32(x) for x in launch.scalars), pointers[3]]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
    block = (launch.code.warps * 32, 1, 1)
    must(cuda.cuLaunchKernel(function, *launch.grid, *block, launch.code.shared, None, arguments, None))
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", [(2, 3, 64, 2, 40), (1, 4, 256, 2, 80), (1, 3, 256, 1, 160), (1, 3, 100, 2, 40)])
@pytest.mark.parametrize("kind", ["sparse", "small", "temporal"])
def test_the_ptx_as_tensorrt_launches_it(kind, shape):
    from tav_opt.kernels import aot
    from tav_opt.kernels.tiles import architecture

    b, f, n, heads, d = shape
    q, k, v = (x.contiguous() for x in inputs(*shape, torch.float16))
    sizes = {"b": b, "frames": f, "n": n, "heads": heads, "width": d, "dtype": q.dtype, "arch": architecture(q)}
    launch = aot.temporal(**sizes) if kind == "temporal" else aot.sparse_causal(**sizes, small=kind == "small")
    out = torch.full_like(q, float("nan"))
    launch_by_driver(launch, q, k, v, out)
    compare(out, q, k, v, f, heads, temporal_attention if kind == "temporal" else sparse_causal_attention)
