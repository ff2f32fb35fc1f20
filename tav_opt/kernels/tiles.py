"""Tile sizes of the sparse-causal kernel by architecture, head width and n; `autotune.py` rewrites the table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """One program's tile: rows of queries and of keys, warps, and how many tiles of keys are in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


class Row(NamedTuple):
    """`tile` holds from `architecture` on (89 = sm_89), for heads up to `width` and frames of `n` tokens or more."""

    architecture: int
    width: int
    n: int
    tile: Tile
    reason: str


# Chosen from the compiled code alone where the reason names no card: no spills, most warps on a multiprocessor.
# fmt: off
TABLE = (
    Row(80, 64, 0, Tile(128, 64, 8, 3), "16 warps from two programs; 37 KB, so three stages cost no program"),
    Row(80, 80, 0, Tile(128, 64, 8, 2), "the accumulator takes 40 to 64 registers; 4 warps would spill on sm_89"),
    Row(80, 128, 0, Tile(128, 32, 8, 2), "64 keys spill where n is no multiple of them"),
    Row(80, 160, 0, Tile(64, 32, 4, 2), "two programs; 128 queries spill on sm_86 and sm_89 unless they divide n"),
    Row(80, 256, 0, Tile(64, 32, 8, 1), "also from 161 on, where 128 queries spill"),
    Row(90, 64, 0, Tile(128, 64, 8, 2), "100 registers, so two programs overlap; a third stage makes it 132, so one"),
    Row(90, 128, 0, Tile(128, 64, 8, 3), "123 registers and 82 KB at width 80: two programs"),
    Row(90, 192, 0, Tile(128, 64, 8, 2), "203 registers: one program, so a second stage is enough"),
    Row(90, 256, 0, Tile(128, 32, 8, 2), "64 keys spill"),
    Row(100, 64, 0, Tile(128, 64, 8, 3), "95 registers, 44 KB: two programs"),
    Row(100, 128, 0, Tile(128, 64, 8, 3), "120 registers and 72 KB at width 80: two programs"),
    Row(100, 192, 0, Tile(128, 64, 8, 2), "128 keys use all 255 registers"),
    Row(100, 256, 0, Tile(64, 32, 8, 2), "half the queries of narrower heads, for shared memory"),
    Row(120, 64, 0, Tile(128, 64, 8, 3), "as sm_80: mma.sync, and 99 KB of shared memory"),
    Row(120, 80, 0, Tile(128, 64, 8, 2), "as sm_80; 4 warps spill"),
    Row(120, 128, 0, Tile(128, 32, 8, 2), "64 keys spill where n is no multiple of them"),
    Row(120, 160, 0, Tile(128, 32, 8, 1), "64 keys spill, and a second stage where n is no multiple of 128"),
    Row(120, 256, 0, Tile(64, 32, 8, 1), "as sm_80"),
)
# fmt: on

# Within 48 KB of shared memory on every architecture: what a launch gets without asking for more.
SMALL = {80: Tile(64, 32, 4, 2), 192: Tile(64, 16, 4, 2), 256: Tile(32, 16, 4, 1)}
# float32 runs on the plain units, exactly as PyTorch's default does; these keep within 48 KB and do not spill.
FLOAT32 = {128: Tile(32, 32, 8, 1), 160: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)}


def architecture(x: Tensor) -> int:
    """The architecture of the GPU that holds x, 90 for sm_90, which also stands for Triton's interpreter."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def sparse_causal_tile(arch: int, n: int, width: int, itemsize: int, small: bool = False) -> Tile:
    """The tile for frames of n tokens and heads `width` wide; `small` and old cards stay within 48 KB."""
    if itemsize == 4 or small or arch < TABLE[0].architecture:
        tile = _narrowest(FLOAT32 if itemsize == 4 else SMALL, width)
    else:
        known = max(row.architecture for row in TABLE if row.architecture <= arch)
        rows = [row for row in TABLE if row.architecture == known and row.width >= width and row.n <= n]
        tile = min(rows, key=lambda row: (row.width, -row.n)).tile
    return _fit(tile, n)


def _narrowest(table: dict[int, Tile], width: int) -> Tile:
    return table[min(limit for limit in table if limit >= width)]


def _fit(tile: Tile, n: int) -> Tile:
    """A small frame needs no more rows than it has tokens: 64 queries, or fewer, in half the warps."""
    if tile.queries > 64 >= n:
        return tile._replace(queries=64, warps=4)
    return tile
