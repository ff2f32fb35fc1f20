"""The group norm's kernels on a GPU: parity with float64, forward and backward, in the UNet, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tav_opt.kernels.group_norm import group_norm
from tav_opt.kernels.naive import group_norm as naive

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
SILU = pytest.mark.parametrize("silu", [False, True], ids=["norm", "silu"])
# b, frames, c, groups, h, w
SHAPES = [
    (2, 24, 320, 32, 64, 64),
    (1, 3, 2560, 32, 8, 8),
    (2, 5, 96, 32, 9, 7),
    (1, 1, 1, 1, 1, 1),
    (3, 2, 20, 2, 3, 5),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    b, frames, c, _, h, w = shape
    x = torch.randn(b * frames, c, h, w, device="cuda") + 0.5
    given = [x.contiguous(memory_format=torch.channels_last), *(torch.randn(c, device="cuda") for _ in range(2))]
    return [tensor.to(dtype).requires_grad_() for tensor in given]


@SILU
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, dtype, silu):
    given, sizes = inputs(shape, dtype), (shape[1], shape[3], 1e-5)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    out, expected = group_norm(*given, *sizes, silu=silu), naive(*exact, *sizes, silu=silu)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    allowed = torch.finfo(dtype).eps / 2 * expected.abs() + 2e-5
    assert ((out - expected).abs() < allowed).all()
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, given, grad)
    for a, b in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert (a - b).norm() < torch.finfo(dtype).eps * b.norm() + 2e-5 * b.numel() ** 0.5
    again = torch.autograd.grad(group_norm(*given, *sizes, silu=silu), given, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "the same bits every time"


def test_replays_in_a_cuda_graph():
    x, weight, bias = (tensor.detach() for tensor in inputs((1, 3, 64, 32, 8, 8), torch.float16))
    group_norm(x, weight, bias, 3, 32, 1e-5, silu=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = group_norm(x, weight, bias, 3, 32, 1e-5, silu=True)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert (out - naive(x.float(), weight.float(), bias.float(), 3, 32, 1e-5, silu=True)).abs().max() < 1e-2
