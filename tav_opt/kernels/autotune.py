"""Measures tiles on the GPU at hand and writes them to tiles.json: `python -m tav_opt.kernels.autotune`.

Run by hand, and committed; a server never tunes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tav_opt.config import InputError, first_line
from tav_opt.files import whole
from tav_opt.kernels import flash_backward, naive, tiles
from tav_opt.kernels import sparse_causal_backward as backward
from tav_opt.kernels.sparse_causal_kernel import launch, launch_with_lse
from tav_opt.kernels.tiles import Row, Table, Tile

FRAMES, HEADS, CLIPS = 24, 8, 2
SHAPES = ((40, 4096), (80, 1024), (160, 256), (160, 64))
"""Head width and tokens: Stable Diffusion 1.5 at 512², what takes longest first."""
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


@dataclass(kw_only=True)
class Bench:
    """What times candidates, as long as there is time and the GPU answers, and says what fails or is not tried."""

    milliseconds: Milliseconds
    left: Callable[[], float] = lambda: math.inf
    """Seconds in which another candidate may be begun."""
    say: Callable[[str, str], None] = lambda name, reason: print(f"{name}: {reason}", file=sys.stderr)
    lost: str = ""
    """What the GPU's context was lost with; empty while it is there."""

    def stopped(self) -> str:
        """Why nothing more is begun; empty where it may be."""
        if self.lost:
            return f"the GPU's context was lost with {self.lost}"
        return "" if self.left() > 0 else "the time is used up"


class Measured(NamedTuple):
    """What is known after a shape: its rows, either backward's milliseconds over all shapes so far, the choice."""

    width: int
    n: int
    rows: Mapping[str, Row]
    backward: Mapping[str, float]
    faster: str


def context_lost() -> bool:
    """Whether the GPU answers this process no more, as after an illegal access: whatever comes later fails as well."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # of several kinds, by version
        return True
    return False


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


def right_and_timed(name: str, run: Call, truth: Sequence[Tensor], bench: Bench) -> float:
    """The time of what gives the truth; infinite, with the reason said, for what does not compile, run or agree."""
    try:
        wrong = difference(run(), truth)
        if wrong < ALLOWED:
            return bench.milliseconds(run)
        reason = f"wrong by {wrong:.1e}, {ALLOWED:.1e} is allowed"
    except Exception as refused:  # compilers and drivers refuse in many ways of their own
        reason = f"{type(refused).__name__}: {first_line(refused)[:200]}"
        if context_lost():
            bench.lost = name
            reason += "; the GPU's context is lost with it"
    bench.say(name, reason)
    return math.inf


def fastest(name: str, trial: Trial, candidates: Sequence[Tile], bench: Bench) -> tuple[Tile, str]:
    """The fastest right tile and what was measured; says what was not tried, raises InputError where none is right."""
    times: dict[Tile, float] = {}
    for tile in candidates:
        if bench.stopped():
            break
        times[tile] = right_and_timed(f"{name} {tuple(tile)}", partial(trial.run, tile), trial.truth, bench)
    if untried := [str(tuple(tile)) for tile in candidates if tile not in times]:
        bench.say(name, f"not tried, since {bench.stopped()}: {', '.join(untried)}")
    if min(times.values(), default=math.inf) == math.inf:
        raise InputError(f"none of {len(times)} tiles is right here")
    tile = min(times, key=lambda tile: times[tile])
    tried = f"{len(times)} tried of {len(candidates)}" if untried else f"{len(times)}"
    return tile, f"the fastest of {tried}, {times[tile]:.3f} ms at f = {FRAMES}"


def rows(arch: int, width: int, n: int, card: str, tried: Trials, bench: Bench) -> dict[str, Row]:
    """The measured row for one shape of each kernel that ran; they hold for frames of n tokens or more."""
    found = {}
    for kernel, trial in tried.kernels.items():
        name = f"width {width}, n {n}: {kernel}"
        fitting = [tile for tile in CANDIDATES[kernel] if max(tile.queries, tile.keys) <= max(64, n)]
        try:
            tile, measured = fastest(name, trial, fitting, bench)
        except InputError as none:
            bench.say(name, str(none))
            continue
        found[kernel] = Row(arch, width, n, tile, f"{measured} on {card}")
    return found


def backwards(arch: int, width: int, n: int, new: Mapping[str, Row], tried: Trials, bench: Bench) -> dict[str, float]:
    """Milliseconds of both backwards on one shape, ours with the best tiles known; none once the context is lost."""
    known = dict(zip(tiles.KERNELS[1:], tiles.backward_tiles(arch, n, width, itemsize=2), strict=True))
    best = [new[kernel].tile if kernel in new else tile for kernel, tile in known.items()]
    found, ways = {}, dict[str, Call]({"triton": partial(tried.ours, *best), "flash": tried.flash})
    for name, run in ways.items():
        if not bench.lost:
            found[name] = right_and_timed(f"width {width}, n {n}: backward {name}", run, tried.truth, bench)
    return {} if bench.lost else found


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
    shapes: Sequence[tuple[int, int]], device: str, card: str, bench: Bench, path: Path = tiles.PATH
) -> Iterator[Measured]:
    """Measures every shape, head width and tokens, the most important first, while the bench has not stopped.

    After each the table is written, with the backward that is faster so far: what fails later loses nothing.
    """
    arch = tiles.architecture(torch.empty(0, device=device))
    table, faster = tiles.TABLE, tiles.backward_of(arch)
    total = dict.fromkeys(tiles.BACKWARDS, 0.0)
    for width, n in shapes:
        if why := bench.stopped():
            bench.say(f"width {width}, n {n}", f"not tried, since {why}")
            continue
        tried = trials(width, n, device)
        new = rows(arch, width, n, card, tried, bench)
        table = replaced(table, new)
        for name, time in backwards(arch, width, n, new, tried, bench).items():
            total[name] += time
        if 0 < min(total.values()) < math.inf:
            faster = min(total, key=lambda name: total[name])
            table = table._replace(backward={**table.backward, arch: faster})
        write(table, path)
        yield Measured(width, n, new, dict(total), faster)


def main() -> int:
    """Measures the shapes of Stable Diffusion 1.5 at 512² into the package's own table."""
    if not torch.cuda.is_available():
        print("autotune: needs a CUDA GPU", file=sys.stderr)
        return 2
    median = partial(triton.testing.do_bench, return_mode="median")
    for shape in tune(SHAPES, "cuda", torch.cuda.get_device_name(), Bench(milliseconds=median)):
        print(*shape.rows.values(), sep="\n")
        times = ", ".join(f"{name} {time:.3f} ms" for name, time in shape.backward.items())
        print(f"backward over all shapes so far: {times}: {shape.faster}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
