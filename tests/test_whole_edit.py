"""A whole guided edit by the engine that an export made, against eager PyTorch: kept in the manifest, or nothing is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import Exported, export_once
from tensorrt_stand_in import CPU, deserialize, plan, stand_in

from tav_opt.engines import compiled as compiled_engine
from tav_opt.engines import tensorrt
from tav_opt.engines.onnxruntime import OnnxGraphs
from tav_opt.engines.tensorrt import TensorRtGraphs
from tav_opt.export import compiled, exporting, graphs, parity, whole_edit
from tav_opt.export.__main__ import main
from tav_opt.export.tensorrt import build
from tav_opt.files import read_json
from tav_opt.repository.layout import base_of


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


def off(kind: type, part: float) -> type:
    """A runtime whose noise is wrong by so large a part: little in one step, much in a guided edit."""

    class Off(kind):  # type: ignore[misc, valid-type]
        def of_clip(self, values: Any) -> Any:
            calls, held = super().of_clip(values)
            unet = calls["unet"]
            return {**calls, "unet": lambda **given: {"noise": unet(**given)["noise"] * (1 + part)}}, held

    return Off


def test_psnr_is_that_of_its_definition() -> None:
    frames = np.random.default_rng(0).integers(0, 250, (1, 3, 8, 8, 3), dtype=np.uint8)
    assert whole_edit.psnr(frames + 1, frames) == pytest.approx(20 * math.log10(255))
    assert whole_edit.psnr(frames + 5, frames) == pytest.approx(20 * math.log10(255 / 5))
    one = frames.copy()
    one[0, 0, 0, 0, 0] += 1
    assert (
        whole_edit.psnr(frames, frames) == whole_edit.psnr(one, frames) == pytest.approx(10 * math.log10(255**2 * 576))
    )


def test_the_manifest_keeps_what_the_edit_came_to(exported: Exported) -> None:
    found = read_json(exported.base / "manifest.json")["edit"]
    assert found["psnr"] >= found["least"] == 60
    assert (found["steps"], found["guidance_scale"]) == (5, 7.5)


def test_graphs_that_pass_alone_and_edit_otherwise_are_not_written(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copied(graph: graphs.Graph, folder: Path) -> Path:
        for path in exported.base.glob(f"{graph.spec.file}*"):
            shutil.copy(path, folder)
        return folder / graph.spec.file

    monkeypatch.setattr(graphs, "write", copied)
    monkeypatch.setattr(exporting, "OnnxGraphs", off(OnnxGraphs, 0.02))
    assert main([str(exported.checkpoint), "--repository", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a whole edit by onnxruntime" in said and "dB against eager PyTorch after 5 steps, 60 dB at least" in said
    assert not files(tmp_path)


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Path:
    """A clip of a repository without engines."""
    without = shutil.ignore_patterns("engines")
    repository = Path(shutil.copytree(exported.repository, tmp_path / "repository", ignore=without))
    return repository / "tune_a_video_stream" / "1" / "clips" / "first"


def test_programs_that_edit_otherwise_are_not_written(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes minutes: eager modules stand for the programs."""
    traced: dict[str, graphs.Graph] = {}

    class Eager:
        def __init__(self, base: Path, info: Any, device: torch.device, *, folder: Path) -> None:
            self.device, self.revision, self.frames_at_once, self.has_threads = device, "r", 4, False
            assert (folder / "manifest.json").is_file(), "by which the programs are opened"

        def of_clip(self, values: Any) -> Any:
            own = traced["unet"].spec.values
            given = {parameter: values[spec.name].float() for parameter, spec in own.items()}
            return {name: self.call(graph, given) for name, graph in traced.items()}, 0

        def call(self, graph: graphs.Graph, values: Any) -> Any:
            return torch.no_grad()(lambda **inputs: graph.run(inputs, values))

    def write(found: list[graphs.Graph], folder: Path, *_: Any) -> dict[str, parity.Parity]:
        traced.update({graph.name: graph for graph in found})
        return {}

    monkeypatch.setattr(compiled, "_write", write)
    monkeypatch.setattr(compiled_engine, "CompiledGraphs", off(Eager, 0.02))
    with pytest.raises(parity.ParityError, match=r"a whole edit by compiled: \d\d\.\d dB .* nothing was written"):
        compiled.export(copied)
    assert not files(base_of(copied) / "engines")
    monkeypatch.setattr(compiled_engine, "CompiledGraphs", Eager)
    found = json.loads((compiled.export(copied) / "manifest.json").read_text())["edit"]
    assert found["psnr"] >= 60


def test_engines_that_run_where_they_are_built_are_written_only_if_they_edit_alike(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs and engines one by one are compared in test_tensorrt_engine.py, where they say too that none was run."""
    stand_in(monkeypatch)
    monkeypatch.setattr(build._Maker, "check_graphs", lambda *_: {})
    monkeypatch.setattr(build._Maker, "compared", lambda *_: {})
    monkeypatch.setattr(build.Plan, "runs_here", lambda *_: True)
    monkeypatch.setattr(build, "GPU", CPU)
    monkeypatch.setattr(tensorrt, "deserializer", lambda _: deserialize)
    monkeypatch.setattr(build, "TensorRtGraphs", off(TensorRtGraphs, 0.1))
    with pytest.raises(parity.ParityError, match=r"a whole edit by tensorrt: .* 45 dB at least"):
        build.export(plan(), copied)
    engines = base_of(copied) / "engines"
    assert not [path for path in engines.iterdir() if path.is_dir()]
    monkeypatch.setattr(build, "TensorRtGraphs", TensorRtGraphs)
    (folder,) = build.export(plan(), copied)
    edit = read_json(folder / "manifest.json")["edit"]
    assert edit["psnr"] >= edit["least"] == 45
