"""Graphs that came to a base later, in the forms that engines take beside ONNX: fp16, compiled, TensorRT's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from controls import maps_of, write_controlnet
from exported import FRAMES, SIDE, Exported, export_once
from served import serving
from tensorrt_stand_in import as_if_here, plan, stand_in

from tav_opt import editing
from tav_opt.client import Client
from tav_opt.config import Control, EditConfig, EngineName, InputError, WorkerConfig
from tav_opt.engines import onnxruntime, registry
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.pytorch import TorchEngine, open_checkpoint
from tav_opt.export import conditions, half_graph
from tav_opt.export.__main__ import main
from tav_opt.export.tensorrt import build
from tav_opt.files import read_json
from tav_opt.repository import clips

pytestmark = pytest.mark.full
"""Three graphs are exported, and each once more in every form; real programs and engines are compiled."""

CPU = torch.device("cpu")
PLAIN = EditConfig(prompts=("a dog is skiing",), steps=3, guidance_scale=3.0)
FOLLOWED = replace(PLAIN, controls=(Control(name="pose", scale=0.7, end=0.7),))
KEPT = replace(PLAIN, keep="background", word_weights=("dog:2",))
MAPS = {"pose": maps_of(FRAMES, SIDE, SIDE, 3)}
ADDED = {"hint_pose", "controlnet_pose", "unet_controlnet", "unet_controlled"}
FULL, HALF = (0.05, 3), (3.0, 48)
"""How far frames may be from eager PyTorch's, in the mean and at most: as test_engines.py has them."""


@pytest.fixture(scope="module")
def place(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_controlnet(shallow, tmp_path_factory.mktemp("net") / "pose", 1)


@pytest.fixture(scope="module")
def exported(golden: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The clip `first`, and graphs that came to its base later."""
    found = export_once(golden, tmp_path_factory.getbasetemp())
    assert main([*command(found, place), "--attention-control"]) == 0
    return found


def command(exported: Exported, place: Path | None) -> list[str]:
    given = [str(exported.checkpoint), f"--repository={exported.repository}", "--name=first"]
    return given if place is None else [*given, f"--controlnet=pose={place}"]


@pytest.fixture(scope="module")
def eager(exported: Exported, place: Path) -> TorchEngine:
    return open_checkpoint(exported.checkpoint, controlnets={"pose": place})


@pytest.fixture(scope="module")
def expected(eager: TorchEngine) -> list[np.ndarray]:
    """Plain, followed, kept."""
    return [editing.edit(eager, config, maps=maps) for config, maps in ((PLAIN, {}), (FOLLOWED, MAPS), (KEPT, {}))]


def assert_edits(engine: ExportedEngine, expected: list[np.ndarray], tolerance: tuple[float, int]) -> None:
    mean, most = tolerance
    for config, maps, frames in zip((PLAIN, FOLLOWED, KEPT), ({}, MAPS, {}), expected, strict=True):
        # Where words look is a threshold: at its edge fp16 takes another side.
        own = (mean, 255) if config is KEPT and tolerance is HALF else (mean, most)
        assert_near(editing.edit(engine, config, maps=maps), frames, own)
    for other in expected[1:]:
        assert np.abs(other.astype(int) - expected[0]).mean() > 1, "what was added does nothing"


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: tuple[float, int]) -> None:
    difference = np.abs(found.astype(int) - expected)
    assert difference.mean() <= tolerance[0] and difference.max() <= tolerance[1], (difference.mean(), difference.max())


def opened(exported: Exported, engine: EngineName) -> ExportedEngine:
    return registry.open_clip(exported.repository, "first", engine=engine, device=CPU, threads=1)


def test_an_fp16_base_has_what_was_added_in_fp16_over_its_weights(
    exported: Exported,
    place: Path,
    expected: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = onnxruntime.half_folder(exported.base)
    assert main([*command(exported, None), "--half"]) == 0, "of a network, only the graph is known"
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "is without" in line]
    assert f"{folder.name} is without controlnet_pose: give --controlnet pose=PLACE" in said
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "precision", lambda _base, _device: "fp16")
        with pytest.raises(InputError, match=r"onnxruntime has not controlnet_pose of base .*: export it with --half"):
            editing.edit(opened(exported, "onnxruntime"), FOLLOWED, maps=MAPS)
    stamp = (folder / "unet_controlled.fp16.onnx").stat().st_mtime_ns
    assert main([*command(exported, place), "--half"]) == 0
    assert "is without" not in capsys.readouterr().err
    assert (folder / "unet_controlled.fp16.onnx").stat().st_mtime_ns == stamp, "what is there is left"

    told = read_json(folder / "manifest.json")["added"]
    assert set(told) == ADDED and all(0 < one["parity"]["error"] <= 1e-2 for one in told.values())
    for name in ("unet_controlnet", "unet_controlled"):
        assert {*told[name]["files"]} == {f"{name}.fp16.onnx"}, "weights of its own"
        kinds = [
            x.data_type for x in onnx.load(folder / f"{name}.fp16.onnx", load_external_data=False).graph.initializer
        ]
        assert kinds.count(onnx.TensorProto.FLOAT16) > 100
    assert clips.verify(exported.repository) == []
    monkeypatch.setattr(onnxruntime, "precision", lambda _base, _device: "fp16")
    assert_edits(opened(exported, "onnxruntime"), expected, HALF)


def test_fp16_of_another_graph_than_was_added_is_not_taken(exported: Exported, place: Path) -> None:
    half_graph.export(clip(exported), further=further(exported, place))
    folder, kept = onnxruntime.half_folder(exported.base), (exported.base / "manifest.json").read_bytes()
    told = json.loads(kept)
    told["added"]["unet_controlled"]["files"] = {"unet_controlled.onnx": "0" * 64}
    (exported.base / "manifest.json").write_text(json.dumps(told))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "precision", lambda _base, _device: "fp16")
        assert set(onnxruntime.added_files(exported.base, CPU)) == ADDED - {"unet_controlled"}
    (exported.base / "manifest.json").write_bytes(kept)
    assert folder.is_dir()


def clip(exported: Exported) -> Path:
    return exported.version / "clips" / "first"


def further(exported: Exported, place: Path) -> list[conditions.Further]:
    return conditions.further({"pose": place}, {}, exported.base)


@pytest.mark.parametrize("target", ["tensorrt-rtx"])
def test_engines_of_what_was_added_run_as_the_others_do(
    exported: Exported, place: Path, expected: list[np.ndarray], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the stand-in: inputs, rows, values and memory are those of real engines."""
    stand_in(monkeypatch)
    (folder,) = build.export(plan(), clip(exported), further=further(exported, place))
    told = read_json(folder / "manifest.json")["added"]
    assert {name: sorted(one["files"]) for name, one in told.items()} == {
        "hint_pose": ["hint_pose-4.engine"],
        "controlnet_pose": ["controlnet_pose-4.engine"],
        "unet_controlnet": ["unet_controlnet-1.engine", "unet_controlnet-2.engine"],
        "unet_controlled": ["unet_controlled-3.engine"],
    }
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build.export(plan(), clip(exported)) == [folder]
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    as_if_here(monkeypatch, "tensorrt-rtx")
    engine = opened(exported, "tensorrt")
    assert not ADDED & set(engine.base.graphs.batched), "loaded when first asked for"
    assert_edits(engine, expected, HALF)
    assert set(engine.base.graphs.batched) >= ADDED
    two = replace(KEPT, prompts=("a dog is skiing", "a cat and a dog"), steps=1)
    assert editing.edit(engine, two).shape[0] == 2, "more rows than an engine has go through edit by edit"


def test_real_engines_of_what_was_added_are_built_without_a_gpu(exported: Exported, place: Path) -> None:
    """They are built and described; running them needs a card."""
    pytest.importorskip("tensorrt_rtx")
    assert main([*command(exported, place), "--target=tensorrt-rtx", "--arch=sm89"]) == 0
    (folder,) = [path for path in exported.base.glob("engines/tensorrt-rtx-*-sm89-*") if "9.9" not in path.name]
    told = read_json(folder / "manifest.json")["added"]
    assert set(told) == ADDED
    for name, one in told.items():
        assert one["needs"] > 0 and 0 < one["parity_of_graphs"]["onnxruntime"] <= 1e-2, name
        assert all((folder / file).stat().st_size > 10_000 for file in one["files"])
    names = [tensor["name"] for tensor in told["unet_controlnet"]["engines"]["unet_controlnet-2.engine"]]
    engine = (folder / "unet_controlnet-2.engine").read_bytes()
    assert "mid_block_additional_residual" in names and all(name.encode() in engine for name in names)
    assert clips.verify(exported.repository) == []


@pytest.fixture(scope="module")
def compiled(exported: Exported, place: Path) -> Exported:
    """With real programs of the processor."""
    assert main([*command(exported, place), "--target=compiled"]) == 0
    return exported


def test_programs_of_what_was_added_share_the_unets_weights(compiled: Exported, expected: list[np.ndarray]) -> None:
    (folder,) = compiled.base.glob("engines/compiled-*")
    told = read_json(folder / "manifest.json")["added"]
    assert set(told) == ADDED and all(one["parity"]["error"] <= 1e-3 for one in told.values())
    assert {*told["unet_controlnet"]["files"]} == {"unet_controlnet.pt2"}, "weights of its own"
    for name in ("hint_pose", "controlnet_pose"):
        assert {*told[name]["files"]} == {f"{name}.pt2", f"{name}.safetensors"}
    engine = opened(compiled, "compiled")
    before = engine.extra_bytes(1, controls=("pose",))
    own = sum(os.path.getsize(folder / f"{name}.safetensors") for name in ("hint_pose", "controlnet_pose"))
    assert before > engine.extra_bytes(1) + own
    assert_edits(engine, expected, FULL)
    assert engine.extra_bytes(1, controls=("pose",)) < before, "what is loaded is counted once"


@pytest.fixture(scope="module")
def answers(compiled: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    config = WorkerConfig(cache=tmp_path_factory.mktemp("served") / "cache", engine="compiled", batch_requests=2)
    with serving(compiled.repository, config) as server, Client(server.grpc_url) as client:
        yield client


def test_the_server_edits_by_programs_that_were_added(answers: Client, expected: list[np.ndarray]) -> None:
    for config, maps, frames in zip((PLAIN, FOLLOWED, KEPT), ({}, MAPS, {}), expected, strict=True):
        found = answers.edit("first", config, maps=maps)
        assert found.metadata[0]["engine"] == "compiled"
        assert_near(found.frames, frames, FULL)
