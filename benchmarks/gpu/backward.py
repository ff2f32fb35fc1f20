"""The backward of sparse-causal attention, both ways, and the tiles of all its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from attention import measure, milliseconds
from report import Report

from tav_opt.config import first_line

DRY = ((16, 40),)
"""Head width and tokens."""
CONTEXT = "the GPU's context"
"""Without which nothing runs in this process."""


def backward(report: Report) -> None:
    """Each shape: gradients against the naive twin's in float32, then times."""
    from tav_opt.kernels import autotune, tiles

    for width, n in _shapes(report):
        tried = autotune.trials(width, n, str(report.device))
        best = tiles.backward_tiles(tiles.architecture(torch.empty(0, device=report.device)), n, width, itemsize=2)
        for name, run in {"triton": partial(tried.ours, *best), "flash": tried.flash}.items():
            row = f"f {autotune.FRAMES}, n {n}, width {width}: {name}"
            try:
                wrong = autotune.difference(run(), tried.truth)
            except Exception as refused:  # of as many kinds as drivers have
                report.fault(row, f"{type(refused).__name__}: {first_line(refused)[:200]}")
                if autotune.context_lost():
                    report.fault(CONTEXT, f"lost with {row}: nothing is tried after it")
                    return
                continue
            if wrong >= autotune.ALLOWED:
                report.fault(row, f"wrong by {wrong:.1e}, {autotune.ALLOWED:.1e} is allowed: not timed")
            else:
                report.figures(row, milliseconds(measure(run)) | {"wrong by": wrong})


def autotune(report: Report) -> None:
    """The fastest right tile of each kernel and shape, in a table beside the results."""
    from tav_opt.kernels import autotune

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "a processor"
    timed = lambda call: measure(call).median * 1e3  # noqa: E731
    bench = autotune.Bench(milliseconds=timed, left=report.left, say=report.left_out)
    for shape in autotune.tune(_shapes(report), str(report.device), card, bench, report.beside("tiles.json")):
        at = f"n {shape.n}, width {shape.width}"
        for kernel, row in shape.rows.items():
            report.row(f"{kernel}, {at}", tile=str(tuple(row.tile)), measured=row.reason)
        times = {f"{name}, ms": milliseconds for name, milliseconds in shape.backward.items()}
        report.figures(f"the backward, down to {at}", {"faster": shape.faster} | times)
    if bench.lost:
        report.fault(CONTEXT, f"lost with {bench.lost}")


def _shapes(report: Report) -> Sequence[tuple[int, int]]:
    """Head widths and tokens; a dry run has a small clip too."""
    from tav_opt.kernels import autotune

    if report.dry:
        autotune.FRAMES, autotune.HEADS, autotune.CLIPS = 3, 1, 1
        return DRY
    return autotune.SHAPES
