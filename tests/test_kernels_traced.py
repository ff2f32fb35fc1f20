"""The ops as compilers see them on CUDA, traced without a GPU: our kernels themselves, with their constants."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be traced", allow_module_level=True)

import triton
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.backends.compiler import GPUTarget

from tav_opt.kernels import sparse_causal_kernel, temporal_kernel
from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention
from tav_opt.kernels.tiles import sparse_causal_tile

FRAMES, TOKENS, HEADS, WIDTH = 3, 64, 2, 40
OPS = [torch.ops.tav_opt.sparse_causal_attention.default, torch.ops.tav_opt.temporal_attention.default]


class Both(torch.nn.Module):
    """Two attentions."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + sparse_causal_attention(x, x + 1, x, FRAMES, HEADS)
        return x + temporal_attention(x, x, x + 1, FRAMES, HEADS)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card in name: tensors on it have no memory."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", target)


def exported(device: str) -> torch.export.ExportedProgram:
    """With a free batch, in fp16."""
    b = torch.export.Dim("b", min=1, max=8)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), torch.no_grad():
        x = torch.empty(2 * FRAMES, TOKENS, HEADS * WIDTH, device=device, dtype=torch.float16)
        return torch.export.export(Both(), (x,), dynamic_shapes=({0: FRAMES * b},))


def as_compiled(program: torch.export.ExportedProgram) -> list[Any]:
    """The calls that PyTorch's compilers are given."""
    graph = program.run_decompositions({}, decompose_custom_triton_ops=True).graph
    return [node for node in graph.nodes if node.op == "call_function"]


def test_on_cuda_the_kernels_stand_in_the_compiled_graph(hopper: None) -> None:
    """Each writes to its output alone: no input is copied before, and none is taken for changed."""
    program = exported("cuda")
    assert [node.target for node in program.graph.nodes if node.target in OPS] == OPS, "an export is of ops"
    calls = [node for node in as_compiled(program) if "triton_kernel" in str(node.target)]
    assert not [node for node in as_compiled(program) if node.target in OPS]
    tile = sparse_causal_tile(90, TOKENS, WIDTH, 2)
    kinds = (
        (sparse_causal_kernel.sparse_causal_kernel, sparse_causal_kernel.constants(WIDTH, TOKENS, tile)),
        (temporal_kernel.temporal_kernel, temporal_kernel.constants(WIDTH, FRAMES)),
    )
    launched = ((tile.warps, tile.stages), (temporal_kernel.warps(FRAMES, WIDTH), 1))
    for call, (kernel, constants), options in zip(calls, kinds, launched, strict=True):
        found = kernel_side_table.get_kernel(call.kwargs["kernel_idx"])
        assert found.fn is kernel
        assert [(config.num_warps, config.num_stages) for config in found.configs] == [options]
        assert call.kwargs["tensors_to_clone"] == ["out"]
        assert {name: call.kwargs["kwargs"][name] for name in constants} == constants


def test_on_processors_compilers_see_the_op(hopper: None) -> None:
    """Which runs the twin; attention over frames is standard operators there from the start."""
    targets = [node.target for node in as_compiled(exported("cpu"))]
    assert targets.count(OPS[0]) == 1 and OPS[1] not in targets
    assert not [target for target in targets if "triton_kernel" in str(target)]
