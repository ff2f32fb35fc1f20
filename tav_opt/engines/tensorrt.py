"""Engines of TensorRT or TensorRT for RTX: one set of them a base, whose memory for a clip's values all clips share.

Written against the vendor's API, and run so far only over stand-ins for its compiled half: no engine has run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from tav_opt.config import InputError
from tav_opt.contract import VERSION, ClipInfo
from tav_opt.device import current
from tav_opt.engines import tensorrt_library
from tav_opt.engines.cuda_graph import Replayed, SharedValues
from tav_opt.engines.exported import Call, Late, revision_of
from tav_opt.engines.tensorrt_library import Library, Target
from tav_opt.files import altered
from tav_opt.repository import layout, specs
from tav_opt.repository.layout import ENGINES, MANIFEST, check_added, made_of_added
from tav_opt.schemas import EnginesManifest

_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64}

Deserialize = Callable[[Path], Any]
"""An engine file → the vendor's ICudaEngine."""


def deserializer(library: Library) -> Deserialize:
    """Reads engines by the vendor's runtime, which lives as long as they do."""
    runtime = library.trt.Runtime(library.trt.Logger(library.trt.Logger.ERROR))

    def deserialize(path: Path) -> Any:
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise InputError(
                f"{path}: {library.target} {library.version} does not read it, or has no GPU memory for it: free some, "
                "or export again"
            )
        return engine

    return deserialize


class FixedEngine:
    """One engine of fixed shapes, with buffers of its own but for those in `shared`, which other engines read too."""

    def __init__(self, engine: Any, device: torch.device, shared: Mapping[str, Tensor]) -> None:
        self.engine = engine
        self._context = engine.create_execution_context()
        if self._context is None:  # what the vendor's library answers where its working memory cannot be had
            need = engine.device_memory_size_v2 / 2**30
            raise InputError(f"TensorRT cannot have the {need:.1f} GiB that an engine works in: the GPU has less free")
        self.device = device
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        buffers = {name: shared[name] if name in shared else self._empty(name) for name in names}
        for name, buffer in buffers.items():
            self._context.set_tensor_address(name, buffer.data_ptr())
        inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT" and name not in shared]
        self._outputs = {n: buffers[n] for n in names if engine.get_tensor_mode(n).name == "OUTPUT"}
        self._replayed = Replayed(self._launch, {name: buffers[name] for name in inputs}, device)

    def _empty(self, name: str) -> Tensor:
        shape = tuple(self.engine.get_tensor_shape(name))
        return torch.empty(shape, dtype=_DTYPES[self.engine.get_tensor_dtype(name).name], device=self.device)

    @property
    def rows(self) -> int:
        """How long the first axis of its inputs is."""
        return next(iter(self._replayed.buffers.values())).shape[0]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of exactly the engine's shapes → its outputs, which the next call overwrites."""
        return self._replayed(inputs)

    def _launch(self) -> dict[str, Tensor]:
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0
        if not self._context.execute_async_v3(stream):
            raise RuntimeError("the engine did not run: the vendor's log has the reason")
        return self._outputs

    def wait(self) -> None:
        """Until nothing that was launched is at work any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget_graph(self) -> None:
        """After other weights were put in."""
        self._replayed.forget()


class Batched:
    """A graph as engines of one or several lengths: longer inputs go through in parts, a short last one filled up."""

    def __init__(self, engines: list[FixedEngine]) -> None:
        self._engines = {engine.rows: engine for engine in engines}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Inputs whose first axis has any length → the outputs of that length, in fresh memory."""
        rows = next(iter(inputs.values())).shape[0]
        parts, start, needed = [], 0, _needed(inputs)
        while start < rows:
            count = self._count(needed[start:], start)
            size = min(n for n in self._engines if n >= count)
            part = {name: _filled(value[start : start + count], size) for name, value in inputs.items()}
            parts.append({name: x[:count].clone() for name, x in self._engines[size](part).items()})
            start += count
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _count(self, needed: Sequence[int], start: int) -> int:
        """How many rows from `start` on are the next part: those after it need none of them."""
        whole = [n for n in self._engines if n <= len(needed)] or [len(needed)]
        for count in range(max(whole), 0, -1):
            if all(row >= start + count for row in needed[count:]):
                return count
        raise InputError(f"rows that need each other are more than the {max(self._engines)} of an engine")


def _needed(inputs: Mapping[str, Tensor]) -> list[int]:
    """The first row that each takes something of: its own, but for attention control that takes of rows above."""
    rows = range(next(iter(inputs.values())).shape[0])
    above = [inputs[name].tolist() for name in ("self_source", "cross_source") if name in inputs]
    return [row - max((one[row] for one in above), default=0) for row in rows]


def _filled(x: Tensor, rows: int) -> Tensor:
    """Repeats the last row until there are `rows`."""
    missing = rows - x.shape[0]
    return x if missing == 0 else torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])


class Values(Protocol):
    """What puts a clip's values into the engines that take them."""

    def hold(self, clip: object, values: Mapping[str, Tensor]) -> None:
        """Puts them there unless they are; `clip` says whose they are."""


class RefittedValues:
    """The values as weights of the engines, replaced by the vendor's refitter at a switch of clips."""

    def __init__(self, library: Library, engines: list[FixedEngine]) -> None:
        self._library, self._engines = library, engines
        self._clip: object = None

    def hold(self, clip: object, values: Mapping[str, Tensor]) -> None:
        if self._clip is clip:
            return
        self._clip = None  # a refit that fails half-way leaves nobody's values
        arrays = {name: value.cpu().half().numpy() for name, value in values.items()}
        for fixed in self._engines:
            fixed.wait()  # weights that a launch reads are not to change under it
            with current(fixed.device):
                self._refit(fixed.engine, arrays)
            fixed.forget_graph()
        self._clip = clip

    def _refit(self, engine: Any, arrays: Mapping[str, np.ndarray]) -> None:
        trt = self._library.trt
        refitter = trt.Refitter(engine, trt.Logger(trt.Logger.ERROR))
        for name, array in arrays.items():
            if not refitter.set_named_weights(name, trt.Weights(array)):
                raise RuntimeError(f"the engine has no weights {name!r} to refit")
        if not refitter.refit_cuda_engine():
            raise RuntimeError(f"refit failed; missing: {refitter.get_missing_weights()}")


class TensorRtGraphs:
    """The engines of one base; see `exported.Graphs`.

    Raises InputError when none fits this library and card, with the reasons; when one was altered; when the GPU has
    too little memory.
    """

    frames_at_once = 4
    has_threads = True
    made_by = "--target tensorrt, or tensorrt-rtx"

    def __init__(
        self,
        base: Path,
        library: Library,
        card: str,
        device: torch.device,
        deserialize: Deserialize,
        *,
        engines: Path | None = None,
    ) -> None:
        """`engines`: the folder of those that do not have their place yet."""
        self.device, self._deserialize = device, deserialize
        self._folder = engines = engines or find(base, library, card)
        _check_memory(engines, device)
        manifest = layout.manifest(engines, EnginesManifest)
        self.revision = revision_of(manifest["files"])
        own, self._added = specs.read(base), made_of_added(engines, base)
        self._specs = own | {name: spec for name, spec in specs.added(base).items() if name in self._added}
        self._buffers: dict[str, Tensor] = {}
        if manifest["contract"]["values"] == "inputs":
            values = [value for spec in own.values() for value in spec.values.values()]
            self._buffers = {x.name: torch.zeros(x.fixed(0), dtype=torch.float16, device=device) for x in values}
        fixed = {name: self._opened(sorted(engines.glob(f"{name}-*.engine"))) for name in own}
        self.batched = {name: Batched(found) for name, found in fixed.items()}
        refitted = [engine for name, spec in own.items() if spec.values for engine in fixed[name]]
        self.values: Values = SharedValues(self._buffers) if self._buffers else RefittedValues(library, refitted)
        self.lock = threading.Lock()

    def _opened(self, paths: Sequence[Path]) -> list[FixedEngine]:
        with current(self.device):  # where the vendor's library puts engines; their launches say it by their stream
            return [FixedEngine(self._deserialize(path), self.device, self._buffers) for path in paths]

    @classmethod
    def of(cls, base: Path, _info: ClipInfo, device: torch.device, _threads: int | None = None) -> TensorRtGraphs:
        """The engines for a GPU of this machine, of whichever library has some."""
        library, card = _fitting(base, device)
        with current(device):
            deserialize = deserializer(library)
        return cls(base, library, card, device, deserialize)

    def of_clip(self, values: Mapping[str, Tensor]) -> tuple[Mapping[str, Call], int]:
        """The values stay on the device, in fp16."""
        own = {name: value.to(self.device, torch.float16) for name, value in values.items()}
        turns = {name: _Turn(self, name, own if spec.values else None) for name, spec in self._specs.items()}
        calls: dict[str, Call] = {**turns}
        calls |= {name: Late(partial(self._ready, turns[name])) for name in self._added}
        return calls, sum(value.nbytes for value in own.values())

    def _ready(self, turn: _Turn) -> Call:
        """The engines of a graph that was added, opened for the first clip that asks for it."""
        with self.lock:
            if turn.name not in self.batched:
                check_added(self._folder, turn.name)
                files = self._added[turn.name]["files"]
                self.batched[turn.name] = Batched(self._opened([self._folder / file for file in files]))
        return turn

    def extra_bytes(self, items: Mapping[str, int]) -> int:
        """Of engines that are yet to be opened: they hold their working memory from then on."""
        return sum(
            int(self._added[name].get("needs", 0)) for name in items if name in self._added and name not in self.batched
        )


def why_not(base: Path, _info: ClipInfo, device: torch.device) -> str | None:
    """Why no engine can serve a base on a device; None where one can."""
    try:
        _fitting(base, device)
    except InputError as error:
        return str(error)
    return None


def needed_bytes(base: Path, _info: ClipInfo, device: torch.device) -> int:
    """What opening the base takes in memory: its engines and what they work in, as was counted when they were built."""
    library, card = _fitting(base, device)
    engines = find(base, library, card)
    return max(_weigh(engines), layout.manifest(engines, EnginesManifest).get("needs", 0))


def _fitting(base: Path, device: torch.device) -> tuple[Library, str]:
    """The library, and the card's name for it, that the base has engines for; raises InputError with the reasons."""
    reasons = []
    for target in get_args(Target):
        try:
            library = tensorrt_library.load(target)
            card = tensorrt_library.present_card(library, device)
            find(base, library, card)
            return library, card
        except InputError as error:
            reasons.append(str(error))
    raise InputError("; ".join(reasons))


def find(folder: Path, library: Library, card: str) -> Path:
    """The engines of a base that fit; raises InputError, with the reason of each that does not.

    Of several sets, one whose values are inputs comes before one to refit, and the plugin before standard attention.
    """
    made_of = layout.manifest(folder)["files"]
    reasons, found = [], []
    for path in sorted((folder / ENGINES).glob(f"tensorrt*/{MANIFEST}")):
        try:
            found.append((layout.manifest(path.parent, EnginesManifest), path.parent))
        except InputError as error:
            reasons.append(str(error))
    found.sort(key=lambda one: [one[0]["contract"][key] for key in ("values", "attention")])
    for manifest, engines in found:
        try:
            tensorrt_library.check_fits(manifest, library, card, engines)
            _check_contract(manifest, made_of, engines)
            return engines
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
        need, free = _weigh(engines), torch.cuda.mem_get_info(device)[0]
        if need > free:
            raise InputError(f"{engines.name}: needs more than {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB is free")


def _weigh(engines: Path) -> int:
    """Bytes of the engines of a base's own graphs."""
    return sum((engines / file).stat().st_size for file in layout.manifest(engines, EnginesManifest)["files"])


class _Turn:
    """One graph for one clip: buffers and values are the base's, so clips take turns."""

    def __init__(self, base: TensorRtGraphs, name: str, values: dict[str, Tensor] | None) -> None:
        self.name, self._base, self._values = name, base, values

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        with self._base.lock:
            if self._values is not None:
                self._base.values.hold(self, self._values)
            return self._base.batched[self.name](**inputs)
