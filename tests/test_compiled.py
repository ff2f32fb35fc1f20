"""What only compiled programs have: those for GPUs beside those for processors, fp16, fixed buffers.

No GPU is here: the processor plays one, and the modules that would be compiled play their programs. What every engine
does, these too: test_engines.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import FRAMES, SIDE, Exported, export_once, write_other
from torch import Tensor, nn

from tav_opt import editing
from tav_opt.config import EditConfig
from tav_opt.engines import compiled as engine
from tav_opt.engines import registry
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.export import compiled, exporting, graphs, parity
from tav_opt.export.graphs import Graph
from tav_opt.export.half_module import in_half
from tav_opt.files import read_json
from tav_opt.repository.layout import info_of
from tav_opt.repository.specs import GraphSpec, TensorSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def halves(exported: Exported) -> dict[str, Graph]:
    return {graph.name: in_half(graph, CPU) for graph in graphs.of_clip(exported.version / "clips" / "first")[1]}


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch, halves: dict[str, Graph]) -> None:
    """The processor as a GPU: fp16, fixed buffers; programs are the modules that would be compiled."""
    monkeypatch.setattr(engine, "precision_of", lambda _device: torch.float16)
    monkeypatch.setattr(engine, "form_of", lambda _device: "x86_64-sm90-fp16")
    monkeypatch.setattr(engine, "opened", lambda _path, name, _weights, _device: halves[name].module)

    def compile_program(graph: Graph, path: Path) -> dict[str, Tensor]:
        path.write_text(graph.name)
        return {name: value.contiguous() for name, value in graph.module.state_dict().items()}

    monkeypatch.setattr(compiled, "compile_program", compile_program)


def test_a_gpus_programs_lie_beside_others_and_edit_within_fp16s_error(
    as_gpu: None, exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compared at export, opened by the registry, one set for two clips that take turns, at every number of rows."""
    exporting.export(write_other(exported, tmp_path), exported.repository, name="other")
    clip = exported.version / "clips" / "first"
    found: dict[str, parity.Parity] = {}
    folder = compiled.export(clip, device=CPU, on_graph=found.__setitem__)
    assert folder.name.endswith("x86_64-sm90-fp16") and compiled.export(clip, device=CPU) == folder
    assert read_json(folder / "manifest.json")["machine"]["form"] == "x86_64-sm90-fp16"
    assert {name: result.tolerance for name, result in found.items()} == parity.HALF_TOLERANCES
    with monkeypatch.context() as patch:
        patch.setattr(engine, "form_of", lambda _device: "x86_64-fp32-nhwc")
        reason = str(engine.why_not(exported.base, info_of(clip), CPU))
        assert "no programs for torch" in reason and f"there are {folder.name}" in reason

    first = registry.open_clip(exported.repository, "first", engine="compiled", device=CPU)
    second = ExportedEngine.open(exported.version / "clips" / "other", first.base)
    truth = open_checkpoint(exported.checkpoint)
    config = EditConfig(prompts=("a cat is skiing", "a bear"), steps=3, guidance_scale=7.5)
    expected = editing.edit(truth, config).astype(int)
    assert not np.array_equal(editing.edit(second, config), expected)
    difference = np.abs(editing.edit(first, config) - expected)
    assert difference.shape == (2, FRAMES, SIDE, SIDE, 3)
    assert difference.mean() <= 3.0 and difference.max() <= 48, "as TensorRT's fp16: test_engines.py"
    text = first.encode_text(["a cat", "a dog", "a bear"])
    three = first.inverted_latents.expand(3, -1, -1, -1, -1)
    kept = first.predict(three, 301, text)
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept, truth.predict(three, 301, text), atol=2e-2, rtol=0)
    before = kept.clone()
    first.predict(-three, 301, text)
    assert torch.equal(kept, before), "an answer is fresh memory, not a buffer that the next call overwrites"


def test_a_half_program_that_departs_is_not_written(
    as_gpu: None, exported: Exported, halves: dict[str, Graph], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(exported.repository, tmp_path / "repository"))
    shutil.rmtree(next(copied.glob("*/1/base/*")) / "engines", ignore_errors=True)

    def wrong(_path: Path, name: str, _weights: Any, _device: torch.device) -> Callable[..., Tensor]:
        return lambda *inputs, **values: 1.05 * halves[name].module(*inputs, **values)

    monkeypatch.setattr(engine, "opened", wrong)
    with pytest.raises(parity.ParityError, match=r"text_encoder: error .* over its tolerance 5e-03"):
        compiled.export(copied / "tune_a_video_stream" / "1" / "clips" / "first", device=CPU)
    assert not [path for path in copied.glob("*/1/base/*/engines/*") if path.name != ".lock"]


def test_weights_come_back_in_the_layout_that_they_were_compiled_in(halves: dict[str, Graph]) -> None:
    """A file of weights knows no layout; compiled code reads memory as it lay when it was made."""
    convolutions = 0
    for graph in halves.values():
        for name, weight in graph.module.state_dict().items():
            found = engine.laid_out(weight.contiguous(), CPU)
            assert found.stride() == weight.stride() and torch.equal(found, weight), name
            convolutions += weight.ndim == 4 and not weight.is_contiguous()
    assert convolutions > 10


class Tiny(nn.Module):
    """A norm between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.last(self.norm(self.first(pixels)))


@pytest.mark.full
def test_fp16_is_really_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a processor: a small module, by the same code."""
    monkeypatch.setattr(engine, "precision_of", lambda _device: torch.float16)
    torch.manual_seed(0)
    pixels = TensorSpec(name="pixels", shape=("n", 3, 8, 8), dtype="float32")
    latents = TensorSpec(name="latents", shape=("n", 4, 8, 8), dtype="float32")
    graph = Graph(spec=GraphSpec(name="vae_encoder", inputs=(pixels,), outputs=(latents,)), module=Tiny())
    constants = compiled.compile_program(in_half(graph, CPU), tmp_path / "tiny.pt2")
    weights = {f"vae_encoder.{name}": value for name, value in constants.items()}
    assert weights and {value.dtype for value in weights.values()} == {torch.float16}
    program = engine.opened(tmp_path / "tiny.pt2", "vae_encoder", weights, CPU)
    found = parity.check(graph, compiled.run_of(graph, program, CPU), half=True)
    assert found.error > 1e-5, "fp16 rounds: an error of fp32 is of another program"


def test_what_must_be_fp32_is_so_in_a_half_module(halves: dict[str, Graph]) -> None:
    """Norms' statistics, the softmax's sum, the timestep's sinusoid: each would be wrong in fp16."""
    torch.manual_seed(0)
    x = (300 + 100 * torch.randn(2, 8, 64)).half()  # squares are over fp16's 65,504
    norms = {nn.GroupNorm(2, 8): x, nn.LayerNorm(64): x}
    for norm, given in norms.items():
        torch.testing.assert_close(norm.half()(given).float(), norm.float()(given.float()), atol=4e-3, rtol=2e-3)
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 8192, 8)  # one by one, fp16 stops counting at 2,048
    v = torch.ones(1, 1, 8192, 8)
    attended = torch.nn.functional.scaled_dot_product_attention(q.half(), k.half(), v.half())
    torch.testing.assert_close(attended.float(), v[:, :, :1], atol=1e-3, rtol=0)
    unet: Any = halves["unet"].module
    sample, timestep = torch.zeros(1, 4, 8, 8).half(), torch.tensor([997])
    embedded = unet.unet.get_time_embed(sample, timestep)
    half = embedded.shape[1] // 2
    phases = 997 * torch.exp(-np.log(10000) * torch.arange(half).double() / half)
    truth = torch.cat([torch.cos(phases), torch.sin(phases)])[None]
    torch.testing.assert_close(embedded.double(), truth, atol=1e-3, rtol=0)
