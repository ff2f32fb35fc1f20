"""The kernels compiled without a GPU: no spills, matrix instructions, and the parameter list that TensorRT passes."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from triton import knobs

from tav_opt.config import InputError
from tav_opt.kernels import aot
from tav_opt.kernels.tiles import sparse_causal_tile

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
SD = {40: 4096, 80: 1024, 160: 256}  # head width: tokens of a frame at 512²
WIDTHS = (40, 64, 80, 128, 160, 192, 256)
FULL = pytest.mark.full
CASES = [
    *((arch, width, SD[width], HALF, False) for arch in aot.ARCHITECTURES for width in SD),
    *((90, width, 4096, HALF, True) for width in WIDTHS),
    (90, 160, 64, HALF, False),
    (90, 40, 4096, BRAIN, False),
    (90, 80, 1023, HALF, False),
    *(
        pytest.param(arch, width, n, dtype, small, marks=FULL)
        for arch in aot.ARCHITECTURES
        for width in WIDTHS
        for n, dtype, small in ((4096, HALF, True), (4000, HALF, False), (64, HALF, False), (4000, SINGLE, False))
    ),
]
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a program may take
MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTC[A-Z]*MMA", 120: "HMMA"}


def instructions(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parameters(ptx: str, entry: str) -> list[str]:
    """Types of the entry's parameters: u64 for pointers, u32 for integers."""
    declared = re.search(rf"\.visible \.entry {entry}\((.*?)\)", ptx, re.DOTALL)
    assert declared, "the PTX has no such entry"
    return re.findall(r"\.param \.(\w+)", declared[1])


def matrix_instruction(arch: int, rows: int) -> str:
    """wgmma and tcgen05 take 64 rows or more; smaller tiles run on mma.sync, which every architecture has."""
    return MATRIX[arch] if rows >= 64 else "HMMA"


def check(launch: aot.Launch, arch: int, dtype: torch.dtype, rows: int = 64) -> None:
    code = launch.code
    assert code.spills == 0, f"{code.spills} bytes of stack, {code.registers} registers"
    if dtype.itemsize == 2:
        name = matrix_instruction(arch, rows)
        found = re.search(rf"\b{name}", instructions(code.cubin))
        assert found, f"no {name} on sm_{arch}"
    assert parameters(code.ptx, code.entry) == ["u64"] * 3 + ["u32"] * len(launch.scalars) + ["u64"]
    assert ".loc" not in code.ptx and ".file" not in code.ptx, "line information would carry paths into engines"
    assert code.shared <= SHARED[arch] * 1024


@pytest.mark.parametrize("arch, width, n, dtype, small", CASES)
def test_sparse_causal(arch, width, n, dtype, small):
    launch = aot.sparse_causal(b=2, frames=24, n=n, heads=8, width=width, dtype=dtype, arch=arch, small=small)
    tile = sparse_causal_tile(arch, n, width, dtype.itemsize, small)
    check(launch, arch, dtype, tile.queries)
    if small or dtype == SINGLE:
        assert launch.code.shared <= 48 * 1024
    assert launch.grid == (-(-n // tile.queries), 8, 48)
    assert launch.scalars[:4] == (24, n, n * 8 * width, 8 * width)


@pytest.mark.parametrize(
    "arch, frames, width",
    [(90, 24, 40), (89, 24, 40), (90, 100, 160)]
    + [pytest.param(arch, f, w, marks=FULL) for arch in aot.ARCHITECTURES for f in (8, 24, 32) for w in SD],
)
def test_temporal(arch, frames, width):
    check(aot.temporal(b=2, frames=frames, n=64, heads=8, width=width, dtype=HALF, arch=arch), arch, HALF)


@pytest.mark.parametrize("arch", [89, pytest.param(90, marks=FULL)])
def test_the_cut_ptx_assembles(arch):
    """What TensorRT gives the driver is whole without its hidden parameters: ptxas takes it."""
    launch = aot.sparse_causal(b=1, frames=3, n=64, heads=2, width=40, dtype=HALF, arch=arch)
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/kernel.ptx", "w") as file:
            file.write(launch.code.ptx)
        command = [knobs.nvidia.ptxas.path, f"-arch=sm_{arch}{suffix}", "-v", file.name, "-o", f"{folder}/kernel.cubin"]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "0 bytes spill stores" in run.stderr


def test_unknown_architectures_are_refused():
    with pytest.raises(InputError, match="sm_75"):
        aot.sparse_causal(b=1, frames=3, n=64, heads=2, width=40, dtype=HALF, arch=75)


@pytest.mark.parametrize("n", [1, 64, 4096, 100000])
@pytest.mark.parametrize("width", [4, 40, 65, 161, 256])
@pytest.mark.parametrize("arch", [70, 75, 80, 86, 90, 103, 121, 130])
def test_every_head_has_a_tile(arch, width, n):
    for itemsize in (2, 4):
        tile = sparse_causal_tile(arch, n, width, itemsize)
        assert tile.keys >= 16 and tile.queries >= 16 and tile.warps in (4, 8)
