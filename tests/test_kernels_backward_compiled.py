"""The kernels of tuning compiled without a GPU: no spills, matrix instructions, shared memory that a card has."""

from __future__ import annotations

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from test_kernels_compiled import BRAIN, FULL, HALF, SD, SHARED, SINGLE, WIDTHS, instructions, matrix_instruction

from tav_opt.kernels import aot, sparse_causal_backward, sparse_causal_kernel, temporal_backward, temporal_kernel
from tav_opt.kernels.inputs import temporal_backward_rows
from tav_opt.kernels.sparse_causal_kernel import constants
from tav_opt.kernels.temporal import backward_fits
from tav_opt.kernels.tiles import Tile, backward_tiles, sparse_causal_tile

POINTERS = {"lse", "delta", "dk_first", "dv_first"}  # always float32
KERNELS = {
    "forward": (sparse_causal_kernel.sparse_causal_kernel, ["u64"] * 3 + ["u32"] * 8 + ["u64"] * 2),
    "queries": (sparse_causal_backward.query_gradients_kernel, ["u64"] * 6 + ["u32"] * 8 + ["u64"] * 2),
    "keys": (sparse_causal_backward.key_gradients_kernel, ["u64"] * 6 + ["u32"] * 10 + ["u64"] * 4),
    "temporal": (temporal_backward.temporal_backward_kernel, ["u64"] * 4 + ["u32"] * 7 + ["u64"] * 3),
}
CASES = [
    *((arch, width, SD[width], HALF) for arch in (80, 90, 120) for width in SD),
    (90, 160, 64, HALF),
    (90, 40, 4096, BRAIN),
    (90, 80, 1023, HALF),
    (80, 40, 4096, SINGLE),
    *(
        pytest.param(arch, width, n, dtype, marks=FULL)
        for arch in aot.ARCHITECTURES
        for width in WIDTHS
        for n, dtype in ((4096, HALF), (4000, HALF), (64, HALF), (4000, SINGLE))
    ),
]


def compiled(
    name: str, n: int, width: int, dtype: torch.dtype, arch: int, constexprs: dict, tile: Tile, cut: int = 0
) -> aot.Ptx:
    """One of KERNELS as a launch with contiguous tensors of eight heads compiles it; `cut` integers are constants."""
    kernel, parameters = KERNELS[name]
    parameters = [p for i, p in enumerate(parameters) if p == "u64" or i >= parameters.index("u32") + cut]
    sizes = {"frames": 24, "start": 0, "group": 24, "n": n} | aot._strides(n, 8 * width)
    signature = {}
    for argument in (name for name in kernel.arg_names if name not in constexprs):
        if argument in sizes:
            signature[argument] = "i32" if sizes[argument] % 16 else "i32:16"
        else:
            signature[argument] = "*fp32:16" if argument in POINTERS else f"{aot._TYPES[dtype]}:16"
    code = aot.compile_ptx(kernel, signature, constexprs, arch, warps=tile.warps, stages=tile.stages)
    declared = re.search(rf"\.visible \.entry {code.entry}\((.*?)\)", code.ptx, re.DOTALL)
    assert declared and re.findall(r"\.param \.(\w+)", declared[1]) == parameters
    return code


def check(code: aot.Ptx, arch: int, dtype: torch.dtype, rows: int, stack: int = 0) -> None:
    assert code.spills <= stack, f"{code.spills} bytes of stack, {code.registers} registers"
    assert code.shared <= SHARED[arch] * 1024
    if dtype.itemsize == 2:
        name = matrix_instruction(arch, rows)
        assert re.search(rf"\b{name}", instructions(code.cubin)), f"no {name} on sm_{arch}"


@pytest.mark.parametrize("arch, width, n, dtype", CASES)
def test_sparse_causal(arch, width, n, dtype):
    of_queries, of_keys = backward_tiles(arch, n, width, dtype.itemsize)
    for name, tile, rows in (("queries", of_queries, of_queries.queries), ("keys", of_keys, of_keys.keys)):
        code = compiled(name, n, width, dtype, arch, constants(width, n, tile), tile)
        check(code, arch, dtype, rows)


@pytest.mark.parametrize("arch, width", [(80, 40), (90, 40), (120, 40), (90, 160)])
def test_the_forward_with_its_log_sum_exp(arch, width):
    """What each step of tuning launches; TensorRT has the same kernel without that argument."""
    tile = sparse_causal_tile(arch, SD[width], width, HALF.itemsize)
    check(
        compiled("forward", SD[width], width, HALF, arch, constants(width, SD[width], tile), tile),
        arch,
        HALF,
        tile.queries,
    )


@pytest.mark.parametrize(
    "arch, frames, width, dtype",
    [(80, 24, 40, HALF), (90, 24, 160, HALF), (120, 24, 80, HALF), (90, 24, 40, SINGLE)]
    + [
        pytest.param(arch, frames, width, dtype, marks=FULL)
        for arch in aot.ARCHITECTURES
        for frames in (8, 24, 64)
        for width in WIDTHS
        for dtype in (HALF, SINGLE)
    ],
)
def test_temporal(arch, frames, width, dtype):
    if not backward_fits(torch.empty(1, 1, 8 * width, dtype=dtype), frames, 8):
        pytest.skip("takes the twin's gradients")
    rows = temporal_backward_rows(frames, dtype.itemsize)
    constexprs = temporal_kernel.constants(width, frames) | {"ROWS": rows}
    tile = Tile(rows, rows, temporal_backward.warps(rows, dtype.itemsize), 1)
    stack = 8 if (arch, frames, width) == (100, 8, 128) else 0  # one value, at 72 registers: ptxas's own choice
    check(compiled("temporal", 64, width, dtype, arch, constexprs, tile), arch, dtype, rows, stack)


@pytest.mark.parametrize(
    "name, ones", [("queries", ("n", "frames")), ("keys", ("n", "frames", "group")), ("keys", ("start", "group"))]
)
def test_arguments_of_one_are_constants(name, ones):
    """Which Triton makes of them at a launch."""
    n, tile = 1 if "n" in ones else 64, Tile(64, 64, 8, 2)
    constexprs = constants(40, n, tile) | dict.fromkeys(ones, 1)
    compiled(name, n, 40, HALF, 90, constexprs, tile, cut=len(ones))


@pytest.mark.parametrize("n", [1, 64, 4096, 100000])
@pytest.mark.parametrize("width", [4, 40, 65, 161, 256])
@pytest.mark.parametrize("arch", [70, 75, 80, 86, 90, 103, 121, 130])
def test_every_head_has_tiles(arch, width, n):
    for itemsize in (2, 4):
        for tile in backward_tiles(arch, n, width, itemsize):
            assert tile.keys >= 16 and tile.queries >= 16 and tile.warps in (4, 8)
