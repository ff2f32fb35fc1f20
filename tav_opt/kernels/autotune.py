"""Measures tiles on the GPU at hand and rewrites its rows of the table: `python -m tav_opt.kernels.autotune`.

Run by hand, and committed; a server never tunes.
"""

from __future__ import annotations

import re
import sys
from itertools import product
from pathlib import Path

import torch
import triton

from tav_opt.files import whole
from tav_opt.kernels import tiles
from tav_opt.kernels.sparse_causal_kernel import launch
from tav_opt.kernels.tiles import Row, Tile

FRAMES, HEADS, CLIPS = 24, 8, 2
SHAPES = ((40, 4096), (80, 1024), (160, 256), (160, 64))  # head width and tokens: Stable Diffusion 1.5 at 512²
CANDIDATES = tuple(
    Tile(queries, keys, warps, stages)
    for queries, keys, warps, stages in product((64, 128, 256), (32, 64, 128), (4, 8), (1, 2, 3))
    if queries <= 32 * warps
)


def milliseconds(width: int, n: int, tile: Tile) -> float:
    """The median of one call in fp16; infinite where the tile does not fit the card."""
    q, k, v = (torch.randn(CLIPS * FRAMES, n, HEADS * width, device="cuda", dtype=torch.float16) for _ in range(3))
    try:
        return triton.testing.do_bench(lambda: launch(q, k, v, FRAMES, HEADS, tile=tile), return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def fastest(arch: int, width: int, n: int, card: str) -> Row:
    """The measured row for one shape; it holds for frames of n tokens or more."""
    times = {tile: milliseconds(width, n, tile) for tile in CANDIDATES if tile.queries <= max(64, n)}
    tile = min(times, key=lambda tile: times[tile])
    return Row(arch, width, n, tile, f"the fastest of {len(times)} on {card}, {times[tile]:.3f} ms at f = {FRAMES}")


def rewrite(source: str, rows: list[Row]) -> str:
    """The module's text with `rows` added to the table, in place of rows for the same architecture, width and n."""
    measured = {row[:3] for row in rows}
    table = sorted([row for row in tiles.TABLE if row[:3] not in measured] + rows, key=lambda row: row[:3])
    lines = [
        f'    Row({row.architecture}, {row.width}, {row.n}, Tile{tuple(row.tile)}, "{row.reason}"),' for row in table
    ]
    text = "TABLE = (\n" + "\n".join(lines) + "\n)\n# fmt: on"
    return re.sub(r"TABLE = \(\n.*?\n\)\n# fmt: on", lambda _: text, source, flags=re.DOTALL)


def main() -> int:
    """Measures every shape, prints the rows, writes the table."""
    if not torch.cuda.is_available():
        print("autotune: needs a CUDA GPU", file=sys.stderr)
        return 2
    arch, card = tiles.architecture(torch.empty(0, device="cuda")), torch.cuda.get_device_name()
    rows = [fastest(arch, width, n, card) for width, n in SHAPES]
    for row in rows:
        print(row)
    path = Path(tiles.__file__)
    text = rewrite(path.read_text(), rows)
    with whole(path) as temporary:
        temporary.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
