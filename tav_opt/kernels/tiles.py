"""Tile sizes of the sparse-causal kernels by architecture, head width and n; autotuning writes tiles.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PATH = Path(__file__).with_name("tiles.json")
KERNELS = ("forward", "query_gradients", "key_gradients")
BACKWARDS = ("triton", "flash")
"""Our kernels, or two calls of PyTorch's (flash_backward.py)."""


class Tile(NamedTuple):
    """One program's tile: rows of queries and of keys, warps, and how many tiles of what it reads are in flight."""

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


class Table(NamedTuple):
    """What tiles.json says: rows of tiles by kernel, and by architecture which backward runs from there on."""

    tiles: Mapping[str, Sequence[Row]]
    backward: Mapping[int, str]


def read(path: Path = PATH) -> Table:
    """The table of a file that `text` wrote."""
    value = json.loads(path.read_text(encoding="utf-8"))
    tiles = {
        kernel: [Row(arch, width, n, Tile(*tile), reason) for arch, width, n, tile, reason in value[kernel]]
        for kernel in KERNELS
    }
    backward = {int(arch): name for arch, name in value["backward"].items()}
    assert set(backward.values()) <= set(BACKWARDS), backward
    return Table(tiles, backward)


def text(table: Table) -> str:
    """The table as JSON, one row a line: [architecture, width, n, [queries, keys, warps, stages], reason]."""

    def lines(rows: Sequence[Row]) -> str:
        return "[\n    " + ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n  ]"

    entries: dict[str, Any] = {kernel: lines(table.tiles[kernel]) for kernel in KERNELS}
    entries["backward"] = json.dumps({str(arch): name for arch, name in sorted(table.backward.items())})
    return "{\n" + ",\n".join(f'  "{name}": {value}' for name, value in entries.items()) + "\n}\n"


TABLE = read()
# Within 48 KB of shared memory on every architecture: what a launch gets without asking for more.
SMALL = {80: Tile(64, 32, 4, 2), 192: Tile(64, 16, 4, 2), 256: Tile(32, 16, 4, 1)}
# float32 runs on the plain units, exactly as PyTorch's default does; these keep within 48 KB and do not spill.
FLOAT32 = {128: Tile(32, 32, 8, 1), 160: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)}
# Those of the backward's two kernels, in float32 and on cards before the table's first.
BACKWARD = (Tile(16, 16, 8, 2), Tile(16, 16, 8, 1))


def architecture(x: Tensor) -> int:
    """The architecture of the GPU that holds x, 90 for sm_90, which also stands for Triton's interpreter."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def sparse_causal_tile(arch: int, n: int, width: int, itemsize: int, small: bool = False) -> Tile:
    """The tile for frames of n tokens and heads `width` wide; `small` and old cards stay within 48 KB."""
    rows = TABLE.tiles["forward"]
    if itemsize == 4 or small or arch < rows[0].architecture:
        tile = _narrowest(FLOAT32 if itemsize == 4 else SMALL, width)
    else:
        tile = _known(rows, arch, n, width)
    return _fit(tile, n)


def backward_tiles(arch: int, n: int, width: int, itemsize: int) -> tuple[Tile, Tile]:
    """The tiles of the kernels for the gradients of q, and of k and v."""
    kernels = [TABLE.tiles[kernel] for kernel in KERNELS[1:]]
    if itemsize == 4 or arch < kernels[0][0].architecture:
        return BACKWARD
    of_queries, of_keys = (_known(rows, arch, n, width) for rows in kernels)
    return _fit(of_queries, n), of_keys


def backward_of(arch: int) -> str:
    """Which backward runs on an architecture, one of BACKWARDS."""
    known = [from_arch for from_arch in TABLE.backward if from_arch <= arch]
    return TABLE.backward[max(known)] if known else "triton"


def _known(rows: Sequence[Row], arch: int, n: int, width: int) -> Tile:
    """The row of the newest architecture that has one for this width and n: the first of all has every width."""
    fitting = [row for row in rows if row.architecture <= arch and row.width >= width and row.n <= n]
    return min(fitting, key=lambda row: (-row.architecture, row.width, -row.n)).tile


def _narrowest(table: dict[int, Tile], width: int) -> Tile:
    return table[min(limit for limit in table if limit >= width)]


def _fit(tile: Tile, n: int) -> Tile:
    """A small frame needs no more rows than it has tokens: 64 queries, or fewer, in half the warps."""
    if tile.queries > 64 >= n:
        return tile._replace(queries=64, warps=4)
    return tile
