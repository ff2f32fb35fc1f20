"""The TensorRT engine over a stand-in for the vendor: "engines" are ONNX files, run by onnxruntime at given addresses.

Everything but the vendor's own calls is real: export, naming, buffers, batching, switches of clips, a whole edit.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import FRAMES, SIDE, STEPS, Exported, export_once, write_other

from tav_opt import editing
from tav_opt.config import EditConfig, InputError
from tav_opt.engines import tensorrt as engines
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.engines.tensorrt_library import Library
from tav_opt.export import builder, estimate, layers, parity, repository, tensorrt

constants = pytest.importorskip("polygraphy.constants")
modify_outputs = pytest.importorskip("polygraphy.backend.onnx").modify_outputs
CPU = torch.device("cpu")
LIBRARY = Library(target="tensorrt-rtx", trt=SimpleNamespace(), version="9.9")
_DTYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}


class Context:
    """Runs where `set_tensor_address` says that tensors lie."""

    def __init__(self, engine: StandIn) -> None:
        self._engine, self._addresses = engine, dict[str, int]()

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        inputs = {i.name: self._at(i.name) for i in self._engine.session.get_inputs()}
        (output,) = self._engine.session.run(None, inputs)
        ctypes.memmove(self._addresses[self._engine.session.get_outputs()[0].name], output.tobytes(), output.nbytes)
        return True

    def _at(self, name: str) -> np.ndarray:
        dtype = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}[self._engine.get_tensor_dtype(name).name]
        shape = self._engine.get_tensor_shape(name)
        content = ctypes.string_at(self._addresses[name], int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.frombuffer(content, dtype).reshape(shape)


@dataclass
class StandIn:
    """As much of ICudaEngine as is used."""

    session: onnxruntime.InferenceSession

    def __post_init__(self) -> None:
        self._tensors = {t.name: t for t in (*self.session.get_inputs(), *self.session.get_outputs())}
        self._outputs = {t.name for t in self.session.get_outputs()}
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_shape(self, name: str) -> list[int]:
        return self._tensors[name].shape

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=_DTYPES[self._tensors[name].type])

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="OUTPUT" if name in self._outputs else "INPUT")

    def create_execution_context(self) -> Context:
        return Context(self)


def deserialize(path: Path) -> StandIn:
    return StandIn(onnxruntime.InferenceSession(path.read_bytes()))


def parse(_library: Library, model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    return model


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
    repository.export(other, copied, name="other")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        tensorrt.export(plan("sm89"), copied / "tune_a_video_stream" / "1" / "clips" / "first")
    return copied / "tune_a_video_stream" / "1"


def plan(card: str, *, debug_parity: bool = False) -> tensorrt.Plan:
    config = tensorrt.EngineConfig(target="tensorrt-rtx", cards=(card,), debug_parity=debug_parity)
    return tensorrt.Plan(config=config, library=LIBRARY, cards=(card,))


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """In place of the vendor's parser and compiler: an "engine" is the graph with its weights inside."""
    patch.setattr(builder, "parse", parse)
    patch.setattr(builder, "build", lambda model, **_: (model.SerializeToString(), b""))
    patch.setattr(estimate, "needed", lambda *_: estimate.Needed(weights=0, activations=0, largest=0))


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
    monkeypatch.setattr(tensorrt.Plan, "runs_here", lambda *_: True)
    with pytest.raises(
        parity.ParityError, match=r"vae_decoder: error 4\.\de-02 in tensorrt-rtx .* no engine was written"
    ):
        tensorrt.export(plan("sm86", debug_parity=True), version / "clips" / "first", say=said.append)
    assert len(ran) == 10 and ran[-2:] == ["debug-vae_decoder-4.engine", "vae_decoder-4.engine"]
    departures = [line for line in said if "in tensorrt-rtx: " in line]
    assert [f"debug-{line.split(' in ')[0].replace(' at ', '-')}.engine" for line in departures] == ran[::2]
    assert "no layer departs" in departures[0]
    assert "vae_decoder at 4 in tensorrt-rtx: pixels is the first layer that departs" in departures[-1]
    assert set(version.glob("base/*/engines/*")) == before


def base_folder(version: Path) -> Path:
    return next((version / "base").iterdir())


@pytest.fixture(scope="module")
def base(version: Path) -> engines.TensorRtBase:
    return engines.TensorRtBase.load(base_folder(version), LIBRARY, "sm89", CPU, deserialize)


@pytest.fixture(scope="module")
def engine(version: Path, base: engines.TensorRtBase) -> engines.TensorRtEngine:
    return engines.TensorRtEngine.load(version / "clips" / "first", base)


def test_an_edit_is_the_eager_one(engine: engines.TensorRtEngine, exported: Exported) -> None:
    config = EditConfig(prompts=("a cat is skiing", "a bear"), steps=4, guidance_scale=7.5, inversion_steps=STEPS + 1)
    found, expected = editing.edit(engine, config), editing.edit(open_checkpoint(exported.checkpoint), config)
    assert found.shape == expected.shape == (2, FRAMES, SIDE, SIDE, 3)
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert expected.std() > 10, "an image without contrast proves nothing"
    # fp16 noise under guidance on random weights, against what the other prompt would have changed.
    other = np.abs(expected.astype(int) - expected[::-1])
    assert difference.mean() < 0.2 * other.mean(), f"{difference.mean():.3f}, the prompts differ by {other.mean():.3f}"
    assert difference.max() <= 48, difference.max()


@pytest.mark.parametrize("b", [1, 2, 3, 5])
def test_predict_at_any_batch(engine: engines.TensorRtEngine, exported: Exported, b: int) -> None:
    """Engines are for b = 1 and 2: other batches go through in parts."""
    generator = torch.Generator().manual_seed(b)
    latents = torch.randn((b, *engine.source_latents.shape[1:]), generator=generator)
    text = torch.randn((b, engine.base.tokens, 32), generator=generator)
    expected = open_checkpoint(exported.checkpoint).predict(latents, 501, text)
    torch.testing.assert_close(engine.predict(latents, 501, text), expected, atol=2e-2, rtol=0)


def test_frames_that_fill_no_batch_pass_both_ways(engine: engines.TensorRtEngine, exported: Exported) -> None:
    eager = open_checkpoint(exported.checkpoint)
    latents = engine.encode_video(exported.frames)
    torch.testing.assert_close(latents, eager.encode_video(exported.frames), atol=5e-3, rtol=0)
    three = latents[:, :, :3]
    difference = np.abs(engine.decode(three).astype(int) - eager.decode(three).astype(int))
    assert difference.max() <= 2


def test_clips_switch_and_their_values_are_copied_once(
    version: Path, base: engines.TensorRtBase, engine: engines.TensorRtEngine, exported: Exported, other: Path
) -> None:
    second = engines.TensorRtEngine.load(version / "clips" / "other", base)
    assert isinstance(base.values, engines.SharedValues)
    copies: list[int] = []
    name, buffer = next(iter(base.values.buffers.items()))
    text = engine.encode_text(["a cat"])
    truths = [open_checkpoint(path) for path in (exported.checkpoint, other)]
    noises = [truth.predict(engine.inverted_latents, 301, text) for truth in truths]
    assert (noises[0] - noises[1]).abs().max() > 1e-1, "the clips must differ by more than fp16 does"

    class Counting(torch.Tensor):
        def copy_(self, *arguments: object, **settings: object) -> torch.Tensor:
            copies.append(1)
            return torch.Tensor.copy_(self, *arguments, **settings)  # type: ignore[arg-type]

    base.values.buffers[name] = buffer.as_subclass(Counting)
    for clip, expected, copied in (
        (second, noises[1], 1),
        (second, noises[1], 1),
        (engine, noises[0], 2),
        (engine, noises[0], 2),
    ):
        found = clip.predict(engine.inverted_latents, 301, text)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
        assert len(copies) == copied, "one copy a switch, none where the clip was there already"


def test_results_stay(engine: engines.TensorRtEngine) -> None:
    text = engine.encode_text(["a cat"])
    kept = text.clone()
    engine.encode_text(["a dog is surfing"])
    assert torch.equal(text, kept)


@pytest.fixture
def copied(version: Path, tmp_path: Path) -> Path:
    """The base, to be spoilt."""
    return Path(shutil.copytree(base_folder(version), tmp_path / base_folder(version).name))


def load(folder: Path, *, library: Library = LIBRARY, card: str = "sm89") -> engines.TensorRtBase:
    return engines.TensorRtBase.load(folder, library, card, CPU, deserialize)


def test_no_engine_for_this_card_or_version_gives_the_reasons(version: Path) -> None:
    with pytest.raises(InputError, match="card 'sm89', here it is 'sm120'"):
        load(base_folder(version), card="sm120")
    newer = Library(target="tensorrt-rtx", trt=None, version="10.0")
    with pytest.raises(InputError, match=r"version '9.9', here it is '10.0'"):
        load(base_folder(version), library=newer)


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
