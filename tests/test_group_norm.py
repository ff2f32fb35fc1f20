"""Group norms over clips on a CPU: their numbers, gradients, traces; and their kernels compiled without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tav_opt.config import InputError
from tav_opt.kernels.group_norm import group_norm

ROOT = Path(__file__).parents[1]
OP = torch.ops.tav_opt.group_norm.default
SILU = pytest.mark.parametrize("silu", [False, True], ids=["norm", "silu"])


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        x.requires_grad_()
        for x in (torch.randn(4, 6, 2, 3).to(dtype), torch.rand(6).to(dtype), torch.randn(6).to(dtype))
    ]


def by_dimensions(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Two clips of two frames, three groups: means over frames, channels of a group, height, width."""
    groups = x.unflatten(0, (2, 2)).unflatten(2, (3, 2))  # b f groups size h w
    away = groups - groups.mean((1, 3, 4, 5), keepdim=True)
    away = away / (away.square().mean((1, 3, 4, 5), keepdim=True) + 1e-5).sqrt()
    return away.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


@SILU
def test_the_op_equals_its_definition_and_passes_gradcheck(silu):
    given = inputs()
    exact = by_dimensions(*given)
    exact = exact * exact.sigmoid() if silu else exact
    for found in (OP(*given, 2, 3, 1e-5, silu)[0], group_norm(*given, 2, 3, 1e-5, silu=silu)):
        assert (found - exact).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda *x: OP(*x, 2, 3, 1e-5, silu)[0], given)


def test_opcheck():
    given = inputs(torch.float32)
    torch.library.opcheck(OP, (*given, 2, 3, 1e-5, True))


@pytest.mark.parametrize(
    "changed, word",
    [
        ({"frames": 3}, "frames = 3"),
        ({"groups": 4}, "groups = 4"),
        ({"weight": torch.ones(5)}, r"\(b f\) c h w and twice c"),
        ({"weight": torch.ones(6, dtype=torch.float16)}, "one dtype and device"),
    ],
)
def test_refusals(changed, word):
    x, weight, bias = inputs(torch.float32)
    given = {"x": x, "weight": weight, "bias": bias, "frames": 2, "groups": 3, "eps": 1e-5, "silu": False} | changed
    with pytest.raises(InputError, match=word):
        OP(*given.values())


class Norms(nn.Module):
    """A clip's norm with SiLU, and a frame's."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = group_norm(x, weight, bias, 3, 8, 1e-5, silu=True)
        return group_norm(x, weight, bias, 1, 8, 1e-6)


def exported(device: str) -> torch.export.ExportedProgram:
    """With a free batch, in fp16, channels last, traced without memory."""
    b = torch.export.Dim("b", min=1, max=8)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), torch.no_grad():
        kind = {"device": device, "dtype": torch.float16}
        x = torch.empty(6, 32, 8, 8, **kind, memory_format=torch.channels_last)
        weight, bias = (torch.empty(32, **kind) for _ in range(2))
        return torch.export.export(Norms(), (x, weight, bias), dynamic_shapes=({0: 3 * b}, None, None))


def test_on_processors_exporters_see_standard_operators():
    program = exported("cpu")
    targets = {str(node.target) for node in program.graph.nodes}
    assert "aten.group_norm.default" in targets and not [target for target in targets if "tav_opt" in target]


def test_on_cuda_the_kernels_stand_in_the_compiled_graph():
    """As for attention: the export has the op, compilers get the kernels, of which each writes to its own tensors."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("an interpreted kernel cannot be traced")
    from test_kernels_traced import as_compiled
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    from tav_opt.kernels import group_norm_kernel as kernels

    with pytest.MonkeyPatch.context() as patch:
        as_hopper(patch)
        program = exported("cuda")
        assert [node.target for node in program.graph.nodes if "tav_opt" in str(node.target)] == [OP, OP]
        calls = [node for node in as_compiled(program) if "triton_kernel" in str(node.target)]
    assert not [node for node in as_compiled(program) if node.target == OP]
    written = {
        kernels.moments_kernel: ["mean", "squares"],
        kernels.statistics_kernel: ["group_mean", "group_rstd"],
        kernels.normalize_kernel: ["out"],
    }
    assert [kernel_side_table.get_kernel(call.kwargs["kernel_idx"]).fn for call in calls] == 2 * list(written)
    for call, names in zip(calls, 2 * list(written.values()), strict=True):
        assert sorted(call.kwargs["tensors_to_clone"]) == names
    copies = [node for node in as_compiled(program) if node.target == torch.ops.aten.clone.default]
    assert not copies, "channels that come last are read in place, also by the next norm"


def as_hopper(patch: pytest.MonkeyPatch) -> None:
    """A card in name."""
    from types import SimpleNamespace

    import triton
    from triton.backends.compiler import GPUTarget

    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    patch.setattr(triton.runtime.driver, "_active", target)


CASES = [
    *((arch, 320, 64, 24, 0) for arch in (80, 90, 120)),
    (90, 2560, 8, 24, 0),
    *(
        pytest.param(arch, c, side, frames, number, marks=pytest.mark.full)
        for arch in (80, 86, 89, 90, 100, 120)
        for c, side, frames in ((320, 64, 24), (2560, 8, 24), (960, 33, 3))
        for number in range(8)
    ),
]


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.full)])
@pytest.mark.parametrize("arch, c, side, frames, candidate", CASES)
def test_the_kernels_compile_without_spills(arch, c, side, frames, candidate, dtype):
    """With SiLU, by every candidate for the tiles."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("an interpreted kernel cannot be compiled")
    from tav_opt.kernels import aot, group_norm_backward, group_norm_kernel

    tile, rows, width = group_norm_kernel.CANDIDATES[candidate], frames * side**2, 1 << (c // 32 - 1).bit_length()
    tiled = {"ROWS": tile.rows, "CHANNELS": tile.channels, "STEPS": tile.steps}
    kernels = {
        group_norm_kernel.moments_kernel: tiled,
        group_norm_kernel.statistics_kernel: {"EPS": 1e-5, "CHUNK": 512, "CHUNKS": 16, "WIDTH": width},
        group_norm_kernel.normalize_kernel: tiled | {"SILU": True},
        group_norm_backward.sums_kernel: tiled | {"SILU": True},
        group_norm_backward.input_gradient_kernel: tiled | {"SILU": True},
    }
    for kernel, constexprs in kernels.items():
        if candidate == 0 and (arch, c) == (90, 2560):  # Triton makes constants of arguments that are one
            ones = dict.fromkeys({"rows", "c", "size", "chunks"} & set(kernel.arg_names), 1)
            aot.compile_ptx(
                kernel, _signature(kernel, constexprs | ones, dtype, 1, 1), constexprs | ones, arch, warps=4, stages=3
            )
        signature = _signature(kernel, constexprs, dtype, rows, c)
        code = aot.compile_ptx(kernel, signature, constexprs, arch, warps=tile.warps, stages=3)
        assert code.spills == 0, f"{kernel.__name__}: {code.spills} bytes of stack, {code.registers} registers"
        assert code.shared <= 48 * 1024
        if kernel is group_norm_kernel.normalize_kernel and c % 16 == 0:
            assert "ld.global.v4" in code.ptx, "16 bytes at a time"


def _signature(kernel, constexprs: dict, dtype: torch.dtype, rows: int, c: int) -> dict[str, str]:
    from tav_opt.kernels import aot

    sizes = {"rows": rows, "c": c, "size": c // 32, "chunks": -(-rows // 512)}
    single = ("mean", "squares", "group_mean", "group_rstd", "of_bias", "of_weight", "of_mean", "of_rstd")
    return {
        name: ("i32" if sizes[name] % 16 else "i32:16")
        if name in sizes
        else "*fp32:16"
        if name in single
        else f"{aot._TYPES[dtype]}:16"
        for name in kernel.arg_names
        if name not in constexprs
    }


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's own process")
def test_interpreted_kernels():
    """Triton interprets or compiles for a whole process: the interpreted kernels have one of their own."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "tests/test_group_norm_interpreted.py"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
