"""The backward on a CPU: by two calls of PyTorch's flash backward, the choice of tiles, and how they are measured."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import inputs, truth
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tav_opt.config import InputError
from tav_opt.kernels import flash_backward, tiles
from tav_opt.kernels.naive import first_and_previous, split_heads
from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.tiles import Row, Tile

ROOT = Path(__file__).parents[1]


class TwoCalls(torch.autograd.Function):
    """The truth's result and log-sum-exp, differentiated by two calls."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
        scores = split_heads(q, heads) @ split_heads(first_and_previous(k, frames), heads).transpose(2, 3)
        scores = (scores / (q.shape[2] // heads) ** 0.5).unflatten(0, (-1, frames))
        scores[:, :2, :, :, q.shape[1] :] = -torch.inf  # frames 0 and 1 read frame 0 once
        lse = scores.logsumexp(-1).flatten(0, 1)
        out = truth(q, k, v, frames, heads, sparse_causal_attention).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.sizes = frames, heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *flash_backward.gradients(grad, *ctx.saved_tensors, *ctx.sizes), None, None


@pytest.mark.parametrize("shape", [(1, 1, 2, 1, 4), (1, 2, 3, 2, 4), (2, 4, 2, 1, 8)])
def test_two_calls_pass_gradcheck(shape):
    q, k, v = (x.detach().requires_grad_() for x in inputs(*shape, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *qkv: TwoCalls.apply(*qkv, shape[1], shape[3]), (q, k, v))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 5e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", [(2, 3, 20, 2, 8), (1, 5, 33, 1, 40), (1, 2, 40, 1, 80), (2, 1, 7, 1, 160)])
def test_two_calls_equal_float64(shape, dtype, tolerance):
    q, k, v = (x.detach().requires_grad_() for x in inputs(*shape, dtype=dtype))
    grad = torch.randn(*q.shape[:2], q.shape[2] + 3, dtype=dtype)[..., :-3]
    out = truth(q, k, v, shape[1], shape[3], sparse_causal_attention)
    expected = torch.autograd.grad(out, (q, k, v), grad.double())
    found = torch.autograd.grad(TwoCalls.apply(q, k, v, shape[1], shape[3]), (q, k, v), grad)
    for a, b in zip(found, expected, strict=True):
        assert a.is_contiguous() and a.dtype == dtype
        assert (a - b).abs().max() < tolerance


def test_two_calls_take_half_precision_and_widths_of_eight():
    half, single = torch.empty(1, 1, 80, dtype=torch.float16), torch.empty(1, 1, 80)
    assert flash_backward.fits(half, 2) and not flash_backward.fits(single, 2)
    assert not flash_backward.fits(half, 4), "heads 20 wide"


def test_the_call_on_cuda_is_one_that_pytorch_takes():
    """Its arguments alone: tensors on a card in name."""
    with FakeTensorMode():
        grad, q, out = (torch.empty(2, 3, 96, 40, device="cuda", dtype=torch.float16) for _ in range(3))
        k, v = (torch.empty(2, 3, 32, 40, device="cuda", dtype=torch.float16) for _ in range(2))
        found = flash_backward._flash([grad, q, out, torch.empty(2, 3, 96, device="cuda")], k, v)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]
    assert {x.device.type for x in found} == {"cuda"}


def test_a_table_is_read_as_it_was_written(tmp_path):
    (tmp_path / "tiles.json").write_text(tiles.text(tiles.TABLE))
    assert tiles.read(tmp_path / "tiles.json") == tiles.TABLE
    assert tiles.text(tiles.TABLE) == tiles.PATH.read_text(), "the file is not as autotuning writes it"


def test_our_kernels_are_the_backward_until_a_card_says_otherwise(monkeypatch):
    assert {tiles.backward_of(arch) for arch in (75, 80, 90, 120)} == {"triton"}
    monkeypatch.setattr(tiles, "TABLE", tiles.TABLE._replace(backward={80: "triton", 90: "flash", 100: "triton"}))
    assert [tiles.backward_of(arch) for arch in (75, 80, 89, 90, 100, 120)] == ["triton"] * 3 + ["flash"] + [
        "triton"
    ] * 2


@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_the_first_architecture_of_the_table_has_every_width(kernel):
    rows = tiles.TABLE.tiles[kernel]
    assert any(row.width >= 256 and row.n == 0 and row.architecture == rows[0].architecture == 80 for row in rows)


def test_a_card_with_few_measured_rows_keeps_the_others_of_the_card_before(monkeypatch):
    measured = Row(89, 40, 4096, Tile(64, 64, 4, 3), "measured")
    rows = [*tiles.TABLE.tiles["forward"], measured]
    monkeypatch.setattr(tiles, "TABLE", tiles.TABLE._replace(tiles={**tiles.TABLE.tiles, "forward": rows}))
    tile = tiles.sparse_causal_tile
    assert tile(89, 4096, 40, 2) == tile(89, 9999, 30, 2) == measured.tile
    for n, width in ((1024, 40), (4096, 80), (4096, 256)):
        assert tile(89, n, width, 2) == tile(86, n, width, 2) != measured.tile
    assert tile(90, 4096, 40, 2) != measured.tile


class Measured:
    """Autotuning with kernels in name: the first number of a tile says what happens to it."""

    def __init__(self) -> None:
        pytest.importorskip("triton")
        from tav_opt.kernels import autotune

        self.autotune, self.truth, self.timed, self.said = autotune, [torch.ones(4), torch.ones(3)], [], []
        self.trial = autotune.Trial(self.run, self.truth)
        self.bench = autotune.Bench(milliseconds=self.milliseconds, say=lambda *said: self.said.append(said))

    def run(self, tile: Tile) -> list[Tensor]:
        if tile.queries == 1:
            raise RuntimeError("PassManager::run failed\nand more")
        if tile.queries in (2, 3):
            return [self.truth[0], self.truth[1] * (torch.nan if tile.queries == 2 else 1.01)]
        self.timed.append(tile)
        return [x + 1e-4 for x in self.truth]

    def milliseconds(self, call: Any) -> float:
        call()
        if self.timed[-1].queries == 4:
            raise MemoryError("an illegal memory access was encountered")
        return float(self.timed[-1].queries)

    def fastest(self, *queries: int) -> tuple[Tile, str]:
        return self.autotune.fastest("forward", self.trial, [Tile(q, 64, 4, 1) for q in queries], self.bench)


def test_autotuning_takes_the_fastest_that_compiles_runs_and_is_right():
    measured = Measured()
    tile, said = measured.fastest(7, 1, 2, 3, 4, 6, 8)
    assert tile.queries == 6 and said.startswith("the fastest of 7, 6.000 ms")
    reasons = ("PassManager::run failed", "wrong by inf", "wrong by", "illegal memory access")
    assert len(measured.said) == 4
    for (name, told), queries, reason in zip(measured.said, (1, 2, 3, 4), reasons, strict=True):
        assert name == f"forward ({queries}, 64, 4, 1)" and reason in told and "\n" not in told


def test_autotuning_says_when_nothing_runs():
    with pytest.raises(InputError, match="none of 2 tiles"):
        Measured().fastest(1, 3)


def test_autotuning_keeps_what_it_has_of_a_kernel_that_never_runs():
    measured = Measured()
    good, bad = measured.trial, measured.trial._replace(run=lambda tile: measured.run(tile._replace(queries=1)))
    tried = measured.autotune.Trials({"forward": bad, "query_gradients": good}, lambda *_: [], lambda: [], [])
    found = measured.autotune.rows(90, 40, 64, "a card", tried, measured.bench)
    assert set(found) == {"query_gradients"} and found["query_gradients"].reason.endswith("at f = 24 on a card")
    assert max(found["query_gradients"].tile[:2]) <= 64, "no more rows than a frame has tokens"
    assert measured.said[-1][0] == "width 40, n 64: forward" and measured.said[-1][1].startswith("none of")


def test_autotuning_ends_in_time_and_says_what_it_did_not_try():
    measured = Measured()
    measured.bench.left = lambda: 2 - len(measured.timed) / 2  # two calls a candidate
    tile, said = measured.fastest(7, 6, 5, 8)
    assert tile.queries == 6 and said.startswith("the fastest of 2 tried of 4, ")
    assert measured.said == [("forward", "not tried, since the time is used up: (5, 64, 4, 1), (8, 64, 4, 1)")]


def lose_the_context(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first tile of four queries, as a GPU does: every later call fails, whatever it is."""

    def synchronize() -> None:
        if any(tile.queries == 4 for tile in measured.timed):
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


def test_autotuning_stops_where_the_context_is_lost(monkeypatch):
    measured = Measured()
    lose_the_context(measured, monkeypatch)
    tile, said = measured.fastest(1, 7, 4, 6)
    assert tile.queries == 7 and said.startswith("the fastest of 3 tried of 4, ")
    assert [name for name, _ in measured.said] == ["forward (1, 64, 4, 1)", "forward (4, 64, 4, 1)", "forward"]
    assert measured.said[1][1].endswith("encountered; the GPU's context is lost with it")
    lost = "the GPU's context was lost with forward (4, 64, 4, 1)"
    assert measured.said[2][1] == f"not tried, since {lost}: (6, 64, 4, 1)" and measured.bench.stopped() == lost


def test_autotuning_writes_tiles_and_backward_after_every_shape(monkeypatch, tmp_path):
    """The third shape loses the context amid its backward: the choice stays that of two, its tiles are kept."""
    measured, path, shapes = Measured(), tmp_path / "tiles.json", ((40, 4096), (80, 1024), (160, 256), (160, 64))
    autotune, ways = measured.autotune, {"triton": 9, "flash": 8}
    monkeypatch.setattr(autotune, "CANDIDATES", {kernel: (Tile(7, 16, 4, 1),) for kernel in tiles.KERNELS})
    lose_the_context(measured, monkeypatch)

    def backward(way: str, n: int) -> list[Tensor]:
        return measured.run(Tile(4 if n == 256 else ways[way], 0, 0, 0))

    def trials(_width: int, n: int, _device: str) -> Any:
        ours, flash = (partial(backward, way, n) for way in ways)
        return autotune.Trials(dict.fromkeys(tiles.KERNELS, measured.trial), lambda *_: ours(), flash, measured.truth)

    monkeypatch.setattr(autotune, "trials", trials)
    found = []
    for shape in autotune.tune(shapes, "cpu", "a card", measured.bench, path):
        found.append(shape)
        table = tiles.read(path)
        for kernel in tiles.KERNELS:
            written = [row[:4] for row in table.tiles[kernel] if row.reason.endswith("on a card")]
            assert written == [(90, width, n, Tile(7, 16, 4, 1)) for width, n in sorted(shapes[: len(found)])]
        assert table.backward[90] == shape.faster == "flash"
        ways["triton"] = 8.5  # over both shapes flash is the faster still
    assert [dict(shape.backward) for shape in found] == [
        {"triton": 9, "flash": 8},
        {"triton": 17.5, "flash": 16},
        {"triton": 17.5, "flash": 16},
    ]
    assert [name for name, _ in measured.said] == ["width 160, n 256: backward triton", "width 160, n 64"]


def test_autotuning_replaces_the_rows_it_measured_and_no_others(tmp_path):
    autotune = Measured().autotune
    new = {
        "key_gradients": Row(90, 256, 0, Tile(64, 64, 4, 1), "measured"),
        "forward": Row(90, 40, 4096, Tile(64, 64, 4, 3), "°"),
    }
    autotune.write(autotune.replaced(tiles.TABLE, new), tmp_path / "tiles.json")
    table = tiles.read(tmp_path / "tiles.json")
    for kernel, old in tiles.TABLE.tiles.items():
        kept = {row for row in old if kernel not in new or row[:3] != new[kernel][:3]}
        assert set(table.tiles[kernel]) == kept | ({new[kernel]} if kernel in new else set())
    assert len(table.tiles["key_gradients"]) == len(tiles.TABLE.tiles["key_gradients"])
    assert table.backward == tiles.TABLE.backward


def test_candidates_for_large_frames():
    """Fewest instructions by the compiled code: 128 × 128, 4 warps for 128 queries, 256 queries."""
    autotune = Measured().autotune
    assert {Tile(128, 128, 8, 2), Tile(128, 64, 4, 2), Tile(256, 64, 8, 2)} <= set(autotune.CANDIDATES["forward"])
    for candidates in autotune.CANDIDATES.values():
        assert len(set(candidates)) == len(candidates)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's own process")
def test_interpreted_kernels():
    """Triton interprets or compiles for a whole process: the interpreted kernels have one of their own."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "tests/test_kernels_backward_interpreted.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # its products are too small for threads
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
