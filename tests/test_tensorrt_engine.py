"""What only TensorRT's engines have, over a stand-in for the vendor: tolerances, fitting, switches of clips.

What every engine does, these too: test_engines.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from exported import Exported, export_once, write_other
from tensorrt_stand_in import CARD, CPU, StandIn, as_if_here, deserialize, library, plan, stand_in

from tav_opt.config import InputError
from tav_opt.engines import tensorrt
from tav_opt.engines.cuda_graph import SharedValues
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.engines.registry import open_clip
from tav_opt.engines.tensorrt_library import Library
from tav_opt.export import exporting, layers, parity
from tav_opt.export.tensorrt import build

constants = pytest.importorskip("polygraphy.constants")
modify_outputs = pytest.importorskip("polygraphy.backend.onnx").modify_outputs


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def other(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other(exported, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def version(exported: Exported, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version folder of a repository with two clips and the stand-in's engines."""
    copied = Path(shutil.copytree(exported.repository, tmp_path_factory.mktemp("engines") / "repository"))
    exporting.export(other, copied, name="other")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        build.export(plan("sm89"), copied / "tune_a_video_stream" / "1" / "clips" / "first")
    return copied / "tune_a_video_stream" / "1"


def test_an_engine_over_its_tolerance_is_not_written(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with the card: each engine is run; the last one, the VAE's decoder, was compiled wrongly.

    And before it one that gives out its layers, by which the first that departs is named.
    """
    before = set(version.glob("base/*/engines/*"))
    ran: list[str] = []
    said: list[str] = []

    def runner(_library: Library, engine: Path) -> object:
        ran.append(engine.name)
        model = onnx.load(engine)
        if "vae_decoder" in engine.name:
            bias = next(i for i in model.graph.initializer if i.name.endswith("conv_out.bias"))
            bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float16(0.1), bias.name))
            onnx.save(model, engine)
        return layers.onnxruntime_runner(engine, "tensorrt-rtx")

    def mark_all(parsed: onnx.ModelProto, _model: onnx.ModelProto) -> None:
        parsed.CopyFrom(modify_outputs(parsed, outputs=constants.MARK_ALL))

    stand_in(monkeypatch)
    monkeypatch.setattr(layers, "tensorrt_runner", runner)
    monkeypatch.setattr(layers, "mark_all", mark_all)
    monkeypatch.setattr(build.Plan, "runs_here", lambda *_: True)
    with pytest.raises(
        parity.ParityError, match=r"vae_decoder: error 4\.\de-02 in tensorrt-rtx .* no engine was written"
    ):
        build.export(plan("sm86", debug_parity=True), version / "clips" / "first", say=said.append)
    assert len(ran) == 10 and ran[-2:] == ["debug-vae_decoder-4.engine", "vae_decoder-4.engine"]
    departures = [line for line in said if "in tensorrt-rtx: " in line]
    assert [f"debug-{line.split(' in ')[0].replace(' at ', '-')}.engine" for line in departures] == ran[::2]
    assert "no layer departs" in departures[0]
    assert "vae_decoder at 4 in tensorrt-rtx: pixels is the first layer that departs" in departures[-1]
    assert set(version.glob("base/*/engines/*")) == before


def test_engines_for_a_card_that_is_not_here_say_that_no_edit_was_run(version: Path) -> None:
    (path,) = version.glob("base/*/engines/*/manifest.json")
    edit = json.loads(path.read_text())["edit"]
    assert edit["psnr"] is None and CARD in edit["why"]


def base_folder(version: Path) -> Path:
    return next((version / "base").iterdir())


@pytest.fixture(scope="module")
def engine(version: Path) -> ExportedEngine:
    with pytest.MonkeyPatch.context() as patch:
        as_if_here(patch, "tensorrt-rtx")
        return open_clip(version.parents[1], "first", engine="tensorrt", device=CPU)


def test_clips_switch_and_their_values_are_copied_once(
    version: Path, engine: ExportedEngine, exported: Exported, other: Path
) -> None:
    second = ExportedEngine.open(version / "clips" / "other", engine.base)
    assert isinstance(engine.base.graphs, tensorrt.TensorRtGraphs)
    values = engine.base.graphs.values
    assert isinstance(values, SharedValues)
    copies: list[int] = []
    name, buffer = next(iter(values.buffers.items()))
    text = engine.encode_text(["a cat"])
    truths = [open_checkpoint(path) for path in (exported.checkpoint, other)]
    noises = [truth.predict(engine.inverted_latents, 301, text) for truth in truths]
    assert (noises[0] - noises[1]).abs().max() > 1e-1, "the clips must differ by more than fp16 does"

    class Counting(torch.Tensor):
        def copy_(self, *arguments: object, **settings: object) -> torch.Tensor:
            copies.append(1)
            return torch.Tensor.copy_(self, *arguments, **settings)  # type: ignore[arg-type]

    values.buffers[name] = buffer.as_subclass(Counting)
    for clip, expected, copied in (
        (second, noises[1], 1),
        (second, noises[1], 1),
        (engine, noises[0], 2),
        (engine, noises[0], 2),
    ):
        found = clip.predict(engine.inverted_latents, 301, text)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
        assert len(copies) == copied, "one copy a switch, none where the clip was there already"


class Above:
    """An engine of so many rows, each of which adds the one that stands so many above it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x, above = inputs["x"], inputs["self_source"]
        assert len(x) == self.rows
        return {"y": x + x[(torch.arange(len(x)) - above).clamp(min=0)]}


@pytest.mark.parametrize("above", [[0, 0, 2], [0, 1], [0, 0, 2, 0, 1, 2], [0, 1, 0, 1], [0] * 7, [0, 0, 2, 0, 0]])
def test_rows_that_need_each_other_go_through_in_one_call(above: list[int]) -> None:
    """Edits side by side, as attention control has them: the source, without and with the prompt."""
    given = {"x": torch.arange(1.0, len(above) + 1), "self_source": torch.tensor(above)}
    found = tensorrt.Batched([Above(3)])(**given)["y"]  # type: ignore[list-item]
    assert torch.equal(found, Above(len(above))(given)["y"])


def test_more_rows_than_an_engine_has_are_refused_where_they_need_each_other() -> None:
    with pytest.raises(InputError, match="more than the 2 of an engine"):
        tensorrt.Batched([Above(1), Above(2)])(x=torch.ones(3), self_source=torch.tensor([0, 0, 2]))  # type: ignore[list-item]


@pytest.fixture
def copied(version: Path, tmp_path: Path) -> Path:
    """The base, to be spoilt."""
    return Path(shutil.copytree(base_folder(version), tmp_path / base_folder(version).name))


def load(folder: Path, *, found: Library | None = None, card: str = CARD) -> tensorrt.TensorRtGraphs:
    return tensorrt.TensorRtGraphs(folder, found or library(), card, CPU, deserialize)


def test_no_engine_for_this_card_or_version_gives_the_reasons(version: Path) -> None:
    with pytest.raises(InputError, match="card 'sm89', here it is 'sm120'"):
        load(base_folder(version), card="sm120")
    newer = Library(target="tensorrt-rtx", trt=None, version="10.0")
    with pytest.raises(InputError, match=r"version '9.9', here it is '10.0'"):
        load(base_folder(version), found=newer)


def test_an_altered_engine_is_refused(copied: Path) -> None:
    (path,) = copied.glob("engines/*/unet-2.engine")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match=r"unet-2\.engine missing or altered"):
        load(copied)


def test_engines_of_another_contract_are_refused(copied: Path) -> None:
    (path,) = copied.glob("engines/*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["contract"]["engines"]["unet-2.engine"][0]["shape"][2] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="its contract is another one"):
        load(copied)


def test_engines_of_other_graphs_are_refused(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["unet.onnx"] = "0" * 64
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="made of other graphs"):
        load(copied)


def test_a_base_without_engines_says_what_builds_them(exported: Exported) -> None:
    with pytest.raises(InputError, match=r"has no engines: .*--target tensorrt-rtx"):
        load(exported.base)


def test_engines_are_opened_on_their_own_device(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's library is told of none and takes the current one: of several GPUs, the first."""
    current, opened = list[torch.device](), list[list[torch.device]]()

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def on_current(path: Path) -> StandIn:
        opened.append([*current])
        return deserialize(path)

    monkeypatch.setattr(tensorrt, "current", entered)
    (base,) = version.glob("base/*")
    tensorrt.TensorRtGraphs(base, library(), CARD, CPU, on_current)
    assert opened == [[CPU]] * 5


def test_a_refit_gives_every_engine_a_clips_values_once_and_a_failed_one_leaves_nobodys() -> None:
    """And waits for what runs, on the engine's own device, before recorded launches are forgotten."""
    seen: list[object] = []
    known = {"scale", "shift"}

    class Refitter:
        def __init__(self, engine: str, _logger: object) -> None:
            seen.append(engine)

        def set_named_weights(self, name: str, weights: np.ndarray) -> bool:
            seen.append((name, weights.dtype, weights.tolist()))
            return name in known

        def refit_cuda_engine(self) -> bool:
            return True

    class Logger:
        ERROR = 0

        def __init__(self, _severity: int) -> None:
            pass

    trt = SimpleNamespace(Refitter=Refitter, Weights=lambda array: array, Logger=Logger)
    engines = [
        SimpleNamespace(
            engine=name, device=CPU, wait=lambda: seen.append("wait"), forget_graph=lambda: seen.append("forget")
        )
        for name in ("one", "two")
    ]
    values = tensorrt.RefittedValues(replace(library("tensorrt"), trt=trt), engines)  # type: ignore[arg-type]
    scale = ("scale", np.float16, [2.0])
    for _ in range(2):
        values.hold("first", {"scale": torch.tensor([2.0])})
        assert seen == ["wait", "one", scale, "forget", "wait", "two", scale, "forget"]
    with pytest.raises(RuntimeError, match="no weights 'other'"):
        values.hold("second", {"other": torch.tensor([1.0])})
    seen.clear()
    values.hold("first", {"scale": torch.tensor([2.0])})
    assert len(seen) == 8, "put in again"
