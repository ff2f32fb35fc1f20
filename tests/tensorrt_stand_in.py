"""A stand-in for TensorRT's compiled half: "engines" are ONNX files, run by onnxruntime at given addresses."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tav_opt.engines import tensorrt
from tav_opt.engines.tensorrt_library import Library, Target
from tav_opt.export.tensorrt import build, builder, estimate

CPU = torch.device("cpu")
CARD = "sm89"
_DTYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}


def library(target: Target = "tensorrt-rtx") -> Library:
    return Library(target=target, trt=SimpleNamespace(), version="9.9")


class Context:
    """Runs where `set_tensor_address` says that tensors lie."""

    def __init__(self, engine: StandIn) -> None:
        self._engine, self._addresses = engine, dict[str, int]()

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        inputs = {i.name: self._at(i.name) for i in self._engine.session.get_inputs()}
        found = self._engine.session.run(None, inputs)
        for described, output in zip(self._engine.session.get_outputs(), found, strict=True):
            ctypes.memmove(self._addresses[described.name], output.tobytes(), output.nbytes)
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


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """In place of the vendor's parser and compiler: an "engine" is the graph with its weights inside."""
    patch.setattr(builder, "parse", parse)
    patch.setattr(builder, "build", lambda model, **_: (model.SerializeToString(), b""))
    patch.setattr(estimate, "check_gpu", lambda *_: None)
    patch.setattr(estimate, "needed", lambda *_: estimate.Needed(weights=0, activations=0, largest=0))


def plan(card: str = CARD, *, target: Target = "tensorrt-rtx", debug_parity: bool = False) -> build.Plan:
    """Without our plugin, which onnxruntime does not know."""
    config = build.EngineConfig(target=target, cards=(card,), plugin=False, debug_parity=debug_parity)
    return build.Plan(config=config, library=library(target), cards=(card,))


def as_if_here(patch: pytest.MonkeyPatch, target: Target) -> None:
    """As on a machine with the card and the library: the registry finds engines, and opens them."""
    patch.setattr(tensorrt, "_fitting", lambda base, _device: _found(base, library(target)))
    patch.setattr(tensorrt, "deserializer", lambda _library: deserialize)


def _found(base: Path, found: Library) -> tuple[Library, str]:
    tensorrt.find(base, found, CARD)
    return found, CARD
