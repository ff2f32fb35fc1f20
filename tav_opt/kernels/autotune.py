"""Measures tiles on the GPU at hand and writes them to tiles.json: `python -m tav_opt.kernels.autotune`.

Run by hand, and committed; a server never tunes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tav_opt.config import InputError
from tav_opt.files import whole
from tav_opt.kernels import flash_backward, naive, tiles
from tav_opt.kernels import sparse_causal_backward as backward
from tav_opt.kernels.sparse_causal_kernel import launch, launch_with_lse
from tav_opt.kernels.tiles import Row, Table, Tile

FRAMES, HEADS, CLIPS = 24, 8, 2
SHAPES = ((40, 4096), (80, 1024), (160, 256), (160, 64))  # head width and tokens: Stable Diffusion 1.5 at 512²
CANDIDATES = {
    "forward": (
        Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 4, 2), Tile(128, 64, 4, 3),
        Tile(256, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 128, 4, 1), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2),
    ),
    "query_gradients": (
        Tile(128, 32, 8, 2), Tile(128, 64, 8, 1), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2),
        Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2),
    ),
    "key_gradients": (
        Tile(32, 64, 4, 1), Tile(32, 64, 8, 2), Tile(64, 64, 4, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 2),
        Tile(32, 128, 8, 1), Tile(64, 128, 8, 1), Tile(16, 64, 8, 2), Tile(32, 32, 8, 2),
    ),
}  # fmt: skip
ALLOWED = 3 * torch.finfo(torch.float16).eps
"""Root mean square difference as a share of the truth's; three roundings to nearest explain less than half of it."""
Call = Callable[[], Sequence[Tensor]]
Milliseconds = Callable[[Call], float]


class Trial(NamedTuple):
    """One kernel on one shape: what `run` gives with a tile shall equal `truth`."""

    run: Callable[[Tile], Sequence[Tensor]]
    truth: Sequence[Tensor]


class Trials(NamedTuple):
    """All kernels on one shape, and the backward as a whole, by kernels with the tiles given and by two calls."""

    kernels: Mapping[str, Trial]
    ours: Callable[[Tile, Tile], Sequence[Tensor]]
    flash: Call
    truth: Sequence[Tensor]


def trials(width: int, n: int, device: str = "cuda") -> Trials:
    """Random tensors in fp16, with the naive twin's result and gradients in float32 for the truth."""
    size = (CLIPS * FRAMES, n, HEADS * width)
    q, k, v, grad = (torch.randn(size, device=device, dtype=torch.float16) for _ in range(4))
    exact, (dq, dk, dv) = exactly(q, k, v, grad)
    out, lse = launch_with_lse(q, k, v, FRAMES, HEADS)
    delta = (out.float() * grad.float()).unflatten(2, (HEADS, width)).sum(3).transpose(1, 2).contiguous()

    def of_queries(tile: Tile) -> Sequence[Tensor]:
        return [backward.query_gradients(grad, q, k, v, out, lse, torch.empty_like(lse), FRAMES, HEADS, tile)]

    kernels = {
        "forward": Trial(lambda tile: [launch(q, k, v, FRAMES, HEADS, tile=tile)], [exact]),
        "query_gradients": Trial(of_queries, [dq]),
        "key_gradients": Trial(
            lambda tile: backward.key_gradients(grad, q, k, v, lse, delta, FRAMES, HEADS, tile), [dk, dv]
        ),
    }
    return Trials(
        kernels,
        lambda *best: backward.launch(grad, q, k, v, out, lse, FRAMES, HEADS, tiles=best),
        lambda: flash_backward.gradients(grad, q, k, v, out, lse, FRAMES, HEADS),
        [dq, dk, dv],
    )


def exactly(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The naive twin's result and gradients in float32."""
    q, k, v = (x.float().requires_grad_() for x in (q, k, v))
    out = naive.sparse_causal_attention(q, k, v, FRAMES, HEADS)
    return out.detach(), torch.autograd.grad(out, (q, k, v), grad.float())


def difference(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest of the results' root mean square differences, each as a share of its truth's; NaN is infinite."""
    shares = [(a - b).norm() / b.norm() for a, b in zip(results, truth, strict=True)]
    return torch.stack(shares).nan_to_num(torch.inf).max().item()


def right_and_timed(name: str, run: Call, truth: Sequence[Tensor], milliseconds: Milliseconds) -> float:
    """The time of what gives the truth; infinite, with the reason printed, for what does not compile, run or agree."""
    try:
        wrong = difference(run(), truth)
        if wrong < ALLOWED:
            return milliseconds(run)
        reason = f"wrong by {wrong:.1e}, {ALLOWED:.1e} is allowed"
    except Exception as refused:  # compilers and drivers refuse in many ways of their own
        reason = f"{type(refused).__name__}: {str(refused).strip().splitlines()[:1]}"
    print(f"{name}: {reason}", file=sys.stderr)
    return float("inf")


def fastest(kernel: str, trial: Trial, candidates: Sequence[Tile], milliseconds: Milliseconds) -> tuple[Tile, str]:
    """The fastest right tile and what was measured; raises InputError where none is right."""
    times = {
        tile: right_and_timed(f"{kernel} {tuple(tile)}", lambda tile=tile: trial.run(tile), trial.truth, milliseconds)  # type: ignore[misc]
        for tile in candidates
    }
    tile = min(times, key=lambda tile: times[tile])
    if times[tile] == float("inf"):
        raise InputError(f"{kernel}: none of {len(times)} tiles is right here")
    return tile, f"the fastest of {len(times)}, {times[tile]:.3f} ms at f = {FRAMES}"


def rows(arch: int, width: int, n: int, card: str, tried: Trials, milliseconds: Milliseconds) -> dict[str, Row]:
    """The measured row for one shape of each kernel that ran; they hold for frames of n tokens or more."""
    found = {}
    for kernel, trial in tried.kernels.items():
        fitting = [tile for tile in CANDIDATES[kernel] if max(tile.queries, tile.keys) <= max(64, n)]
        try:
            tile, measured = fastest(kernel, trial, fitting, milliseconds)
        except InputError as none:
            print(f"width {width}, n {n}: {none}", file=sys.stderr)
            continue
        found[kernel] = Row(arch, width, n, tile, f"{measured} on {card}")
    return found


def replaced(table: Table, new: Mapping[str, Row]) -> Table:
    """The table with each kernel's new row, in place of its row for the same architecture, width and n."""
    merged = dict(table.tiles)
    for kernel, row in new.items():
        kept = [old for old in merged[kernel] if old[:3] != row[:3]]
        merged[kernel] = sorted([*kept, row], key=lambda row: row[:3])
    return table._replace(tiles=merged)


def write(table: Table, path: Path = tiles.PATH) -> None:
    """The file, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(tiles.text(table), encoding="utf-8")


def tune(
    shapes: Sequence[tuple[int, int]], device: str, card: str, milliseconds: Milliseconds, path: Path = tiles.PATH
) -> Table:
    """Measures every shape, head width and tokens, and writes the table after each: what fails later loses nothing."""
    arch = tiles.architecture(torch.empty(0, device=device))
    table, total = tiles.TABLE, dict.fromkeys(tiles.BACKWARDS, 0.0)
    for width, n in shapes:
        tried = trials(width, n, device)
        new = rows(arch, width, n, card, tried, milliseconds)
        known = dict(zip(tiles.KERNELS[1:], tiles.backward_tiles(arch, n, width, itemsize=2), strict=True))
        best = [new[kernel].tile if kernel in new else tile for kernel, tile in known.items()]
        for name, run in {"triton": lambda: tried.ours(*best), "flash": tried.flash}.items():  # noqa: B023
            total[name] += right_and_timed(f"backward {name}", run, tried.truth, milliseconds)
        table = replaced(table, new)
        write(table, path)
        print(*new.values(), sep="\n")
    chosen = min(total, key=lambda name: total[name])
    print(*(f"backward {name}: {time:.3f} ms over all shapes" for name, time in total.items()), sep="\n")
    table = table._replace(backward={**table.backward, arch: chosen})
    write(table, path)
    return table


def main() -> int:
    """Measures the shapes of Stable Diffusion 1.5 at 512² into the package's own table."""
    if not torch.cuda.is_available():
        print("autotune: needs a CUDA GPU", file=sys.stderr)
        return 2
    median = partial(triton.testing.do_bench, return_mode="median")
    tune(SHAPES, "cuda", torch.cuda.get_device_name(), median)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
