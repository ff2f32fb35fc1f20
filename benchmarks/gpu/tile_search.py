"""Every tile of the sparse-causal kernel: compiled and checked in a process of its own, then timed one by one.

A tile whose compilation crashes, or that writes where it should not, ends its own process alone. The fastest are said,
with the tile that the table has now; the table itself is changed by hand.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from attention import measure, milliseconds, title
from common import apart
from peers import error, inputs
from predict import SD15, Shape
from report import Report

from tav_opt.config import first_line
from tav_opt.kernels.tiles import Tile, architecture, sparse_causal_tile

DRY_SHAPE, DRY_TILES = Shape(b=2, frames=3, n=40, heads=1, width=40), (Tile(32, 16, 1, 1),)


def tile_search(report: Report) -> None:
    """The fastest right tile of each shape of 24 frames."""
    from tav_opt.kernels.autotune import CANDIDATES

    shapes = (DRY_SHAPE,) if report.dry else tuple(shape for shape in SD15 if shape.frames == 24)
    for shape in shapes:
        if report.left() <= 0:
            report.left_out(title(shape), "not tried, since the time is used up")
            continue
        now = sparse_causal_tile(architecture(torch.empty(0, device=report.device)), shape.n, shape.width, 2)
        tiles = [now] + [tile for tile in CANDIDATES["forward"] if tile.queries <= max(64, shape.n) and tile != now]
        _one_shape(report, shape, DRY_TILES if report.dry else tiles)


@torch.no_grad()
def _one_shape(report: Report, shape: Shape, tiles: Sequence[Tile]) -> None:
    """Rows of all tiles; `tiles` begins with the table's."""
    from tav_opt.kernels.sparse_causal_kernel import launch

    kind = str(report.device)
    with ThreadPoolExecutor(min(len(tiles), max(1, (os.cpu_count() or 1) - 2))) as pool:
        faults = dict(zip(tiles, pool.map(partial(checked_apart, shape, kind), tiles), strict=True))
    qkv, seconds = inputs(shape, report.device, torch.float16), dict[Tile, float]()
    for tile, fault in faults.items():
        name = f"{title(shape)}, {tuple(tile)}"
        if fault and tile == tiles[0]:
            report.fault(name, fault)
        elif fault:
            report.left_out(name, fault)
        else:
            timing = measure(partial(launch, *qkv, shape.frames, shape.heads, tile=tile))
            seconds[tile] = timing.median
            report.figures(name, milliseconds(timing))
    if seconds:
        best = min(seconds, key=lambda tile: seconds[tile])
        gain = {"× the table's": seconds[tiles[0]] / seconds[best]} if tiles[0] in seconds else {}
        figures = {"tile": str(tuple(best)), "ms": seconds[best] * 1e3, "right": len(seconds), "tried": len(tiles)}
        report.figures(f"{title(shape)}: the fastest", figures | gain)


def checked_apart(shape: Shape, device: str, tile: Tile) -> str:
    """Why a tile cannot be taken, found in a process of its own; empty where it can."""
    try:
        return apart(partial(check, shape, device, tile))
    except Exception as error:  # the process ended before it answered
        return f"its process broke: {first_line(error)[:200]}"


@torch.no_grad()
def check(shape: Shape, device: str, tile: Tile) -> str:
    """Compiles and runs a tile on one clip; why it cannot be taken, empty where it can."""
    from tav_opt.kernels.sparse_causal_kernel import launch

    torch.manual_seed(0)
    one = replace(shape, b=1)
    qkv = inputs(one, torch.device(device), torch.float16)
    try:
        wrong = error(launch(*qkv, one.frames, one.heads, tile=tile), qkv, one, samples=16)
    except Exception as refused:  # of shared memory, registers, or the compiler itself
        return f"{type(refused).__name__}: {first_line(refused)[:200]}"
    return f"wrong by {wrong:.2g} × what rounding explains" if wrong >= 1 else ""
