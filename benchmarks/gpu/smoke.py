"""One launch of each kernel against float64, at a small shape that no tile divides."""

from __future__ import annotations

import platform

import torch
from peers import error, inputs
from predict import Shape
from report import Report

from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention

SMALL = Shape(b=2, frames=3, n=70, heads=2, width=40)


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
