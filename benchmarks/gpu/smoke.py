"""One launch of each kernel against float64, at a small shape that no tile divides."""

from __future__ import annotations

import platform

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
GROUPS = 8


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
    each_kernel(report)


@torch.no_grad()
def each_kernel(report: Report) -> None:
    """The error of one launch of each, as a share of rounding."""
    torch.manual_seed(0)
    qkv = inputs(SMALL, report.device, torch.float16)
    for name, attention in (("sparse-causal", sparse_causal_attention), ("temporal", temporal_attention)):
        found = error(attention(*qkv, SMALL.frames, SMALL.heads), qkv, SMALL, temporal=name == "temporal")
        report.row(f"{name} attention", error=found)
        if found >= 1:
            report.fault(f"{name} attention", f"wrong by {found:.2g} × what rounding explains")
    norm = small_norm(report.device)
    exact = naive.group_norm(*(x.double() for x in norm), SMALL.frames, GROUPS, 1e-5, silu=True)
    away = (group_norm(*norm, SMALL.frames, GROUPS, 1e-5, silu=True) - exact).abs()
    found = (away / (torch.finfo(torch.float16).eps * exact.abs() + 1e-4)).nan_to_num(torch.inf).max().item()
    report.row("group norm", error=found)
    if found >= 1:
        report.fault("group norm", f"wrong by {found:.2g} × what rounding explains")


def small_norm(device: torch.device) -> list[Tensor]:
    """x, weight and bias in fp16, of a shape that no tile divides."""
    x = torch.randn(SMALL.b * SMALL.frames, 72, 7, 5, device=device, dtype=torch.float16)
    return [x, *(torch.randn(72, device=device, dtype=torch.float16) for _ in range(2))]
