"""What TensorRT is given of our kernel, and the thin layer that gives it, against the vendor's own Python code."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tav_opt.config import InputError

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from tav_opt.export.tensorrt.plugin_kernel import SHARED_LIMIT, plugin_kernel

FRAMES, HEADS = 24, 8
SD15 = ((4096, 40), (1024, 80), (256, 160), (64, 160))  # tokens of a frame and head width of every level at 512²
HALF = torch.float16


def parameters(ptx: str, entry: str) -> list[str]:
    """Types of the entry's parameters in order: u64 for pointers, u32 for int32."""
    declared = re.search(rf"\.visible \.entry {entry}\((.*?)\)", ptx, re.DOTALL)
    assert declared, "the PTX has no such entry"
    return re.findall(r"\.param \.(\w+)", declared[1])


@pytest.mark.parametrize("arch", [89, 120, pytest.param(80, marks=pytest.mark.full), 90])
@pytest.mark.parametrize(("n", "width"), SD15)
def test_every_layer_of_sd15_is_what_tensorrt_passes(n: int, width: int, arch: int) -> None:
    """Input pointers, int32 scalars, output pointers; nothing else, and no more shared memory than any launch gets."""
    kernel = plugin_kernel((2 * FRAMES, n, HEADS * width), HALF, FRAMES, HEADS, arch)
    assert parameters(kernel.ptx, kernel.entry) == ["u64"] * 3 + ["u32"] * len(kernel.scalars) + ["u64"]
    c = HEADS * width
    assert kernel.scalars == (FRAMES, n, *(n * c, c) * 3), "frames, n, then the strides of q, k, v in values"
    assert kernel.shared <= SHARED_LIMIT
    assert kernel.block[0] in (128, 256) and kernel.block[1:] == (1, 1)
    rows = -(-n // kernel.grid[0])
    assert kernel.grid[1:] == (HEADS, 2 * FRAMES) and rows * kernel.grid[0] >= n > rows * (kernel.grid[0] - 1)


@pytest.mark.parametrize(
    ("shape", "frames", "heads"), [((48, 64, 320), 7, 8), ((48, 64, 320), 24, 7), ((4, 4, 4), 0, 1)]
)
def test_shapes_that_do_not_divide_are_refused(shape: tuple[int, ...], frames: int, heads: int) -> None:
    with pytest.raises(InputError, match="must divide"):
        plugin_kernel(shape, HALF, frames, heads, 89)


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(InputError, match="sm_70"):
        plugin_kernel((4, 64, 80), HALF, 4, 2, 70)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_bindings") is None, reason="pip install --no-deps tensorrt-cu13-bindings"
)
def test_the_vendors_python_layer_takes_the_plugin() -> None:
    """Signatures, attributes, output shape, launch parameters, scalars and PTX as TensorRT 11's own code reads them."""
    script = Path(__file__).with_name("vendor_plugin.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "agreed", run.stderr[-2000:]
