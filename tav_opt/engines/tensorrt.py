"""Engines of TensorRT or TensorRT for RTX: one set of them a base, whose memory for a clip's values all clips share.

Written against the vendor's API, and run so far only over stand-ins for its compiled half: no engine has run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tav_opt.checkpoint import load_tensors
from tav_opt.config import InputError
from tav_opt.contract import VERSION, ClipInfo
from tav_opt.ddim import Schedule
from tav_opt.engines import tensorrt_library
from tav_opt.engines.onnxruntime import GRAPHS, OnnxBase, OnnxEngine, find_clip, revision_of
from tav_opt.engines.tensorrt_library import ENGINES, Library, Target
from tav_opt.engines.working_memory import WorkingMemory
from tav_opt.files import altered, read_json

_NONE = WorkingMemory(np.zeros(1, np.int64), np.zeros(1, np.int64))
"""What a run takes beyond what is held: engines hold their working memory from the start."""
_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64}

Deserialize = Callable[[Path], Any]
"""An engine file → the vendor's ICudaEngine."""


def deserializer(library: Library) -> Deserialize:
    """Reads engines by the vendor's runtime, which lives as long as they do."""
    runtime = library.trt.Runtime(library.trt.Logger(library.trt.Logger.ERROR))

    def deserialize(path: Path) -> Any:
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise InputError(f"{path}: {library.target} {library.version} does not read it: export again")
        return engine

    return deserialize


class FixedEngine:
    """One engine of fixed shapes: buffers made once, and a CUDA graph captured at the second call.

    `shared` are buffers that other engines read too. One call at a time; the output is overwritten by the next.
    """

    def __init__(self, engine: Any, device: torch.device, shared: Mapping[str, Tensor]) -> None:
        self.engine = engine
        self._context = engine.create_execution_context()
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._buffers = {name: shared[name] if name in shared else self._empty(name) for name in names}
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.data_ptr())
        self._inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT" and name not in shared]
        (self._output,) = [name for name in names if engine.get_tensor_mode(name).name == "OUTPUT"]

    def _empty(self, name: str) -> Tensor:
        shape = tuple(self.engine.get_tensor_shape(name))
        return torch.empty(shape, dtype=_DTYPES[self.engine.get_tensor_dtype(name).name], device=self._device)

    @property
    def rows(self) -> int:
        """How long the first axis of its inputs is."""
        return self._buffers[self._inputs[0]].shape[0]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Inputs of exactly the engine's shapes → its output."""
        with self._on_stream():
            for name in self._inputs:
                self._buffers[name].copy_(inputs[name], non_blocking=True)
            self._launch()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return self._buffers[self._output]

    def _on_stream(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _launch(self) -> None:
        self._calls += 1
        if self._stream is None or self._calls == 1:  # the first call may compile and allocate: no graph of it
            self._execute(0 if self._stream is None else self._stream.cuda_stream)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._execute(self._stream.cuda_stream)
        self._graph.replay()

    def _execute(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise RuntimeError("the engine did not run: the vendor's log has the reason")

    def forget_graph(self) -> None:
        """After other weights were put in: the captured launches are of the old ones."""
        self._graph, self._calls = None, 0


class Batched:
    """A graph as engines of one or several lengths: longer inputs go through in parts, a short last one filled up."""

    def __init__(self, engines: list[FixedEngine]) -> None:
        self._engines = {engine.rows: engine for engine in engines}

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Inputs whose first axis has any length → the output of that length, in fresh memory."""
        rows = next(iter(inputs.values())).shape[0]
        parts, start = [], 0
        while start < rows:
            size = max((n for n in self._engines if n <= rows - start), default=min(self._engines))
            part = {name: _filled(value[start : start + size], size) for name, value in inputs.items()}
            parts.append(self._engines[size](part)[: rows - start].clone())
            start += size
        return torch.cat(parts)


def _filled(x: Tensor, rows: int) -> Tensor:
    """Repeats the last row until there are `rows`."""
    missing = rows - x.shape[0]
    return x if missing == 0 else torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])


class Values(Protocol):
    """What puts a clip's values into the UNet's engines."""

    def hold(self, clip: object, values: Mapping[str, Tensor]) -> None:
        """Puts them there unless they are; `clip` says whose they are."""


class SharedValues:
    """Device memory that all UNet engines of a base read as inputs: a switch of clips is one copy of each value."""

    def __init__(self, buffers: dict[str, Tensor]) -> None:
        self.buffers = buffers
        self._clip: object = None

    def hold(self, clip: object, values: Mapping[str, Tensor]) -> None:
        if self._clip is clip:
            return
        for name, buffer in self.buffers.items():
            buffer.copy_(values[name], non_blocking=True)
        self._clip = clip


class RefittedValues:
    """The values as weights of the engines, replaced by the vendor's refitter at a switch of clips."""

    def __init__(self, library: Library, engines: list[FixedEngine]) -> None:
        self._library, self._engines = library, engines
        self._clip: object = None

    def hold(self, clip: object, values: Mapping[str, Tensor]) -> None:
        if self._clip is clip:
            return
        trt = self._library.trt
        self._clip = None  # a refit that fails half-way leaves nobody's values
        for fixed in self._engines:
            refitter = trt.Refitter(fixed.engine, trt.Logger(trt.Logger.ERROR))
            arrays = {name: value.cpu().half().numpy() for name, value in values.items()}
            for name, array in arrays.items():
                if not refitter.set_named_weights(name, trt.Weights(array)):
                    raise RuntimeError(f"the engine has no weights {name!r} to refit")
            if not refitter.refit_cuda_engine():
                raise RuntimeError(f"refit failed; missing: {refitter.get_missing_weights()}")
            fixed.forget_graph()
        self._clip = clip


@dataclass(frozen=True, kw_only=True)
class TensorRtBase(OnnxBase):
    """The engines of one base; `sessions` are `Batched` ones."""

    values: Values
    lock: threading.Lock

    @classmethod
    def load(
        cls, folder: Path, library: Library, card: str, device: torch.device, deserialize: Deserialize
    ) -> TensorRtBase:
        """Opens the engines in `base/<…>/engines` that fit this library and card.

        Raises InputError when none does, with the reasons; when one was altered; when the GPU has too little memory.
        """
        manifest = read_json(folder / "manifest.json")
        engines = find(folder, library, card)
        _check_memory(engines, device)
        contract = read_json(engines / "manifest.json")["contract"]
        inputs = manifest["values"]
        buffers: dict[str, Tensor] = {}
        if contract["values"] == "inputs":
            (described, *_) = [found for name, found in contract["engines"].items() if name.startswith("unet-")]
            shapes = {tensor["name"]: tensor["shape"] for tensor in described}
            buffers = {name: torch.zeros(shapes[name], dtype=torch.float16, device=device) for name in inputs.values()}
        fixed = {
            name: [FixedEngine(deserialize(path), device, buffers) for path in sorted(engines.glob(f"{name}-*.engine"))]
            for name in GRAPHS
        }
        return cls(
            folder=folder,
            revision=revision_of([manifest["files"], read_json(engines / "manifest.json")["files"]]),
            working=dict.fromkeys(GRAPHS, _NONE),
            sessions={name: Batched(found) for name, found in fixed.items()},
            tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
            tokens=manifest["tokens"],
            value_inputs=inputs,
            schedule=Schedule.from_config(manifest["scheduler"]),
            device=device,
            values=SharedValues(buffers) if buffers else RefittedValues(library, fixed["unet"]),
            lock=threading.Lock(),
        )


def find(folder: Path, library: Library, card: str) -> Path:
    """The engines of a base that fit; raises InputError, with the reason of each that does not.

    Of several sets, one whose values are inputs comes before one to refit, and the plugin before standard attention.
    """
    made_of = read_json(folder / "manifest.json")["files"]
    reasons = []
    found = [(read_json(path), path) for path in sorted((folder / ENGINES).glob("*/manifest.json"))]
    for manifest, path in sorted(found, key=lambda pair: [pair[0]["contract"][key] for key in ("values", "attention")]):
        try:
            tensorrt_library.check_fits(manifest, library, card, path.parent)
            _check_contract(manifest, made_of, path.parent)
            return path.parent
        except InputError as error:
            reasons.append(str(error))
    hint = f"python -m tav_opt.export … --target {library.target}"
    raise InputError("; ".join(reasons) or f"{folder.name} has no engines: {hint} builds them")


def _check_contract(manifest: dict[str, Any], made_of: dict[str, str], folder: Path) -> None:
    if manifest.get("version") != VERSION or tensorrt_library.digest(manifest["contract"]) != manifest["contract_hash"]:
        raise InputError(f"{folder}: its contract is another one than version {VERSION}'s: export again")
    if manifest["made_of"] != made_of:
        raise InputError(f"{folder}: its engines were made of other graphs than the base has now: export again")
    if changed := altered(folder, manifest["files"]):
        raise InputError(f"{folder}: {', '.join(changed)} missing or altered: remove the folder and export again")


def _check_memory(engines: Path, device: torch.device) -> None:
    if device.type == "cuda":
        need, free = sum(path.stat().st_size for path in engines.glob("*.engine")), torch.cuda.mem_get_info(device)[0]
        if need > free:
            raise InputError(f"{engines.name}: needs more than {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB is free")


class _Turn:
    """One graph for one clip: buffers and values are the base's, so clips take turns."""

    def __init__(self, base: TensorRtBase, name: str, values: dict[str, Tensor] | None = None) -> None:
        self._base, self._name, self._values = base, name, values

    def __call__(self, **inputs: Tensor) -> Tensor:
        with self._base.lock:
            if self._values is not None:
                self._base.values.hold(self, self._values)
            return self._base.sessions[self._name](**inputs)


class TensorRtEngine(OnnxEngine):
    """An exported clip on the engines of its base; see `engines.Engine`."""

    @classmethod
    def load(cls, folder: Path, base: TensorRtBase) -> TensorRtEngine:
        """Opens `clips/<name>`; its values stay on the device, in fp16.

        Raises InputError when the clip is altered, belongs to another base, or tuned other parameters.
        """
        manifest = read_json(folder / "manifest.json")
        info = ClipInfo.from_json(manifest)
        if info.exported_base != base.folder.name:
            raise InputError(f"clip {folder.name} belongs to base {info.exported_base}, not to {base.folder.name}")
        if changed := altered(folder, manifest["files"]):
            raise InputError(f"{folder}: {', '.join(changed)} missing or altered: remove {folder} and export again")
        tensors = load_tensors(folder / "values.safetensors")
        if set(tensors) != set(base.value_inputs):
            raise InputError(f"clip {folder.name} tuned other parameters than base {base.folder.name} takes")
        values = {base.value_inputs[name]: value.to(base.device, torch.float16) for name, value in tensors.items()}
        latents = load_tensors(folder / "latents.safetensors")
        graphs: dict[str, Any] = {name: _Turn(base, name) for name in GRAPHS}
        return cls(
            base=base,
            info=info,
            revision=revision_of([manifest, base.revision]),
            nbytes=sum(tensor.nbytes for tensor in (*values.values(), *latents.values())),
            source_latents=latents["source"].to(base.device),
            inverted_latents=latents["inverted"].to(base.device),
            graphs=graphs | {"unet": _Turn(base, "unet", values)},
        )


def open_clip(repository: Path, name: str, *, target: Target = "tensorrt") -> TensorRtEngine:
    """Opens an exported clip of a model repository on the engines for this machine's GPU.

    Raises InputError for a name that is not there, a missing library or GPU, and as the base and the clip do.
    """
    clip, base = find_clip(repository, name)
    library = tensorrt_library.load(target)
    card = tensorrt_library.present_card(library)
    opened = TensorRtBase.load(base, library, card, torch.device("cuda"), deserializer(library))
    return TensorRtEngine.load(clip, opened)
