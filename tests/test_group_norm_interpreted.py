"""The group norm's Triton kernels in Triton's interpreter, on CPU tensors; test_group_norm.py starts this file."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from test_kernels_interpreted import poisoned_allocations  # noqa: F401

from tav_opt.kernels import group_norm_backward, group_norm_kernel
from tav_opt.kernels.group_norm import group_norm
from tav_opt.kernels.group_norm_kernel import Tile

OP = torch.ops.tav_opt.group_norm.default
EPS = 1e-5
# b, frames, c, groups, h, w: rows and channels that no tile divides, groups of 1, 3, 10, 40 and all channels.
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 3, 20, 2, 3, 5), (1, 2, 80, 2, 6, 7), (3, 1, 6, 6, 4, 4), (1, 3, 96, 32, 5, 4)]
SHAPES += [(1, 2, 130, 13, 5, 5), (1, 24, 8, 1, 4, 2)]
SILU = pytest.mark.parametrize("silu", [False, True], ids=["norm", "silu"])


def truth(x: Tensor, weight: Tensor, bias: Tensor, frames: int, groups: int, silu: bool) -> Tensor:
    """float64, one clip and one group at a time."""
    x, weight, bias = (tensor.double() for tensor in (x, weight, bias))
    size, clips = x.shape[1] // groups, []
    for clip in x.split(frames):
        parts = []
        for group in clip.split(size, 1):
            away = group - group.mean()
            parts.append(away / (away.square().mean() + EPS).sqrt())
        clips.append(torch.cat(parts, 1))
    y = torch.cat(clips) * weight[:, None, None] + bias[:, None, None]
    return y / (1 + (-y).exp()) if silu else y


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 0.5) -> list[Tensor]:
    """x as a part of a wider tensor with NaN around, its channels last where w is even."""
    torch.manual_seed(0)
    b, frames, c, _, h, w = shape
    wide = torch.full((b * frames, c + 2, h + 1, w), float("nan"), dtype=dtype)
    x = wide[:, 1 : c + 1, :h]
    x.copy_(torch.randn(x.shape) * torch.rand(c)[:, None, None] + mean)
    x = x.contiguous(memory_format=torch.channels_last) if w % 2 == 0 else x
    return [x, torch.randn(c).to(dtype), torch.randn(c).to(dtype)]


@SILU
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape, silu):
    given = inputs(shape)
    out = group_norm(*given, shape[1], shape[3], EPS, silu=silu)
    assert out.shape == given[0].shape and out.is_contiguous(memory_format=torch.channels_last)
    error = (out - truth(*given, shape[1], shape[3], silu)).abs().max().item()
    assert error < 1e-5, f"largest absolute error {error:.1e}"


@SILU
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_float64(shape, silu):
    given = [tensor.requires_grad_() for tensor in inputs(shape)]
    grad = torch.randn(given[0].shape)
    expected = torch.autograd.grad(truth(*given, shape[1], shape[3], silu), given, grad.double())
    found = torch.autograd.grad(group_norm(*given, shape[1], shape[3], EPS, silu=silu), given, grad)
    for name, a, b in zip(("x", "weight", "bias"), found, expected, strict=True):
        error = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
        assert error < 1e-5, f"{name}: largest error {error:.1e}"


@pytest.mark.parametrize("tile", [*group_norm_kernel.CANDIDATES[3:6], Tile(16, 32, 3, 2)], ids=str)
def test_every_tile_gives_the_same(tile):
    shape = (2, 3, 40, 4, 5, 7)
    given, grad = inputs(shape), torch.randn(6, 40, 5, 7)
    out, mean, rstd = group_norm_kernel.launch(*given, 3, 4, EPS, True, tile=tile)
    assert (out - truth(*given, 3, 4, True)).abs().max() < 1e-5
    given = [tensor.requires_grad_() for tensor in given]
    expected = torch.autograd.grad(truth(*given, 3, 4, True), given, grad.double())
    found = group_norm_backward.launch(grad, *(x.detach() for x in given), mean, rstd, 3, True, tile=tile)
    assert all((a - b).abs().max() < 3e-5 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mean", [0.0, 300.0, -3000.0])
def test_a_large_mean_loses_nothing_but_its_own_digits(mean):
    """Sums of squares in float32 would: 9e6 leaves no digit of a variance of 1/3."""
    shape = (1, 2, 24, 3, 8, 8)
    given = inputs(shape, mean=mean)
    out = group_norm(*given, 2, 3, EPS)
    allowed = 1e-5 + 4 * torch.finfo(torch.float32).eps * abs(mean) * 10
    assert (out - truth(*given, 2, 3, False)).abs().max() < allowed


@SILU
def test_half_precision_is_rounded_once(silu):
    shape = (2, 2, 40, 4, 6, 6)
    given = inputs(shape, torch.float16)
    out = group_norm(*given, 2, 4, EPS, silu=silu)
    exact = truth(*given, 2, 4, silu)
    assert out.dtype == torch.float16
    assert ((out - exact).abs() <= torch.finfo(torch.float16).eps / 2 * exact.abs() + 1e-5).all()
    given, grad = [tensor.requires_grad_() for tensor in given], torch.randn(out.shape).half()
    expected = torch.autograd.grad(truth(*given, 2, 4, silu), given, grad.double())
    found = torch.autograd.grad(group_norm(*given, 2, 4, EPS, silu=silu), given, grad)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float16 and (a - b).norm() < torch.finfo(torch.float16).eps * b.norm()


def test_bfloat16_is_rounded_once():
    """The interpreter truncates to bfloat16: a whole unit in the last place."""
    given = inputs((1, 2, 20, 2, 4, 4), torch.bfloat16)
    exact = truth(*given, 2, 2, True)
    out = group_norm(*given, 2, 2, EPS, silu=True)
    assert ((out - exact).abs() <= torch.finfo(torch.bfloat16).eps * exact.abs() + 1e-5).all()


def test_far_values_are_finite():
    """SiLU of -100 is nothing; its gradient too."""
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs((1, 2, 8, 2, 4, 4)))
    with torch.no_grad():
        bias.fill_(-100.0)
        bias[:4] = 100.0
    out = group_norm(x, weight, bias, 2, 2, EPS, silu=True)
    assert out.isfinite().all() and out[:, 4:].abs().max() < 1e-30
    found = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert all(tensor.isfinite().all() for tensor in found)


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        group_norm(*(x.double() for x in inputs(SHAPES[0])), 1, 1, EPS)


def test_the_same_bits_twice():
    given, grad = [tensor.requires_grad_() for tensor in inputs((2, 3, 20, 2, 5, 5))], torch.randn(6, 20, 5, 5)
    runs = []
    for _ in range(2):
        out = group_norm(*given, 3, 2, EPS, silu=True)
        runs.append([out, *torch.autograd.grad(out, given, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@SILU
def test_differences_of_float64(silu):
    """No autograd at all: what a small step along a random direction changes."""
    shape, step = (2, 2, 6, 2, 2, 3), 1e-5
    given = inputs(shape)
    grad = torch.randn(given[0].shape)
    wanted = [tensor.detach().requires_grad_() for tensor in given]
    found = torch.autograd.grad(group_norm(*wanted, 2, 2, EPS, silu=silu), wanted, grad)
    for _ in range(3):
        along = [torch.randn(tensor.shape, dtype=torch.float64) for tensor in given]
        ends = [[x.double() + sign * step * d for x, d in zip(given, along, strict=True)] for sign in (1, -1)]
        above, below = ((truth(*end, 2, 2, silu) * grad).sum() for end in ends)
        slope = sum((g * d).sum() for g, d in zip(found, along, strict=True))
        assert abs((above - below) / (2 * step) - slope) < 1e-4


def test_opcheck():
    x, weight, bias = (tensor.detach().clone().requires_grad_() for tensor in inputs((2, 2, 6, 2, 2, 4)))
    torch.library.opcheck(OP, (x, weight, bias, 2, 2, EPS, True))
    _, mean, rstd = OP(x, weight, bias, 2, 2, EPS, True)
    given = [tensor.detach() for tensor in (torch.randn(x.shape), x, weight, bias, mean, rstd)]
    torch.library.opcheck(torch.ops.tav_opt.group_norm_backward.default, (*given, 2, True))


def test_the_unet_has_its_norms_by_kernels(monkeypatch):
    """All of them, SiLU inside those of resnets; the attentions by their twins."""
    from test_unet import tiny

    from tav_opt import attention
    from tav_opt.kernels import group_norm as op
    from tav_opt.kernels import naive
    from tav_opt.unet import inflate

    torch.use_deterministic_algorithms(False)
    for name in ("sparse_causal_attention", "temporal_attention"):
        monkeypatch.setattr(attention, name, getattr(naive, name))
    unet = inflate(tiny()).eval().requires_grad_(False)
    given = torch.randn(1, 4, 2, 8, 8), torch.tensor([3]), torch.randn(1, 5, 12)
    calls, launch = [], group_norm_kernel.launch
    monkeypatch.setattr(group_norm_kernel, "launch", lambda *given: calls.append(given[-1]) or launch(*given))
    found = unet(*given)
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in unet.modules())
    resnets = sum(hasattr(module, "norm2") and hasattr(module, "conv2") for module in unet.modules())
    assert len(calls) == norms and sum(calls) == 2 * resnets > 0
    monkeypatch.setattr("tav_opt.unet.group_norm", naive.group_norm)
    assert op.group_norm is group_norm and (found - unet(*given)).abs().max() < 1e-5
