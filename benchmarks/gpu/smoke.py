"""One launch of each kernel, forward and backward, against float64, at a small shape that no tile divides."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from peers import error, inputs
from predict import Shape
from report import Report
from torch import Tensor

from tav_opt.kernels import naive
from tav_opt.kernels.group_norm import group_norm
from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention

SMALL = Shape(b=2, frames=3, n=70, heads=2, width=40)
SIZES = (SMALL.frames, SMALL.heads)
GROUPS = 8


class Launched(NamedTuple):
    """What kernels gave, and how wrong it is as a share of what rounding explains: wrong from 1 on."""

    name: str
    results: Sequence[Tensor]
    error: Callable[[], float]


def smoke(report: Report) -> None:
    """The device, and that each kernel runs there and is right."""
    if not report.dry:
        card = torch.cuda.get_device_properties(0)
        report.row(
            "device",
            name=card.name,
            architecture=f"sm_{card.major}{card.minor}",
            multiprocessors=card.multi_processor_count,
            gib=card.total_memory / 2**30,
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            kernel=platform.release(),
        )
    for name, _, wrong in launches(report.device):
        found = wrong()
        report.row(name, error=found)
        if not found < 1:
            report.fault(name, f"wrong by {found:.2g} × what rounding explains")


def launches(device: torch.device) -> Iterator[Launched]:
    """Each kernel once: all that inference launches, and all that tuning does."""
    torch.manual_seed(0)
    qkv = inputs(SMALL, device, torch.float16)
    grad = torch.randn_like(qkv[0])
    yield from _sparse_causal(qkv, grad)
    out = temporal_attention(*qkv, *SIZES)
    yield Launched("temporal attention", [out], partial(error, out, qkv, SMALL, temporal=True))
    yield _backward("temporal attention", temporal_attention, naive.temporal_attention, qkv, SIZES, grad)
    yield from _group_norm(device)


def _sparse_causal(qkv: list[Tensor], grad: Tensor) -> Iterator[Launched]:
    """Our backward whichever of the two the table of tiles has chosen for this card."""
    from tav_opt.kernels.sparse_causal_backward import launch  # which imports Triton

    name = "sparse-causal attention"
    alone = sparse_causal_attention(*qkv, *SIZES)
    yield Launched(name, [alone], partial(error, alone, qkv, SMALL))
    out, lse = torch.ops.tav_opt.sparse_causal_attention_with_lse(*qkv, *SIZES)
    yield Launched(f"{name} with its log-sum-exp", [out, lse], partial(error, out, qkv, SMALL))
    found = launch(grad, *qkv, out, lse, *SIZES)  # wrong where the log-sum-exp is
    exact = partial(_gradients, naive.sparse_causal_attention, [x.double() for x in qkv], SIZES, grad.double())
    yield Launched(f"{name}, backward", found, lambda: _share(found, exact()))


def _group_norm(device: torch.device) -> Iterator[Launched]:
    x = torch.randn(SMALL.b * SMALL.frames, 72, 7, 5, device=device, dtype=torch.float16)
    norm = [x, *(torch.randn(72, device=device, dtype=torch.float16) for _ in range(2))]
    with_silu, its_twin = (partial(by, silu=True) for by in (group_norm, naive.group_norm))
    sizes = (SMALL.frames, GROUPS, 1e-5)
    out = with_silu(*norm, *sizes)

    def wrong() -> float:
        exact = its_twin(*(x.double() for x in norm), *sizes)
        share = (out - exact).abs() / (torch.finfo(torch.float16).eps * exact.abs() + 1e-4)
        return share.nan_to_num(torch.inf).max().item()

    yield Launched("group norm", [out], wrong)
    yield _backward("group norm", with_silu, its_twin, norm, sizes, torch.randn_like(out))


def _backward(
    name: str,
    ours: Callable[..., Tensor],
    twin: Callable[..., Tensor],
    tensors: list[Tensor],
    sizes: Sequence[float],
    grad: Tensor,
) -> Launched:
    found = _gradients(ours, tensors, sizes, grad)
    exact = partial(_gradients, twin, [x.double() for x in tensors], sizes, grad.double())
    return Launched(f"{name}, backward", found, lambda: _share(found, exact()))


def _share(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of what autotuning allows in root mean squares; three roundings to nearest explain less than half of it."""
    from tav_opt.kernels.autotune import ALLOWED, difference

    return difference(found, exact) / ALLOWED


def _gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], sizes: Sequence[float], grad: Tensor
) -> Sequence[Tensor]:
    wanted = [x.detach().requires_grad_() for x in tensors]
    return torch.autograd.grad(function(*wanted, *sizes), wanted, grad)
