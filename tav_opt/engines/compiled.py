"""The exported programs, compiled by AOTInductor for a kind of processor or GPU: code in packages, weights beside."""

from __future__ import annotations

import platform
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tav_opt.checkpoint import load_tensors
from tav_opt.config import InputError
from tav_opt.contract import ClipInfo
from tav_opt.engines.cuda_graph import Replayed, SharedValues
from tav_opt.engines.exported import Call, Late, revision_of
from tav_opt.memory.graph import WorkingMemory
from tav_opt.repository import layout, specs
from tav_opt.repository.layout import ENGINES, MANIFEST, check_added, check_unaltered, made_of_added
from tav_opt.repository.specs import GraphSpec
from tav_opt.schemas import ProgramsManifest

TARGET = "compiled"
WEIGHTS = "weights.safetensors"
"""The frozen weights of all programs, by program and name."""


def own_weights(name: str) -> str:
    """The file of what a program that was added has of weights beside those of the UNet's."""
    return f"{name}.safetensors"


def precision_of(device: torch.device) -> torch.dtype:
    """What the programs of a device compute in."""
    return torch.float16 if device.type == "cuda" else torch.float32


def precision(_base: Path, device: torch.device) -> str:
    """The same by its short name."""
    return "fp16" if precision_of(device) == torch.float16 else "fp32"


def form_of(device: torch.device) -> str:
    """What programs are compiled for, shortly: `x86_64-fp32-nhwc` for a processor, `x86_64-sm90-fp16` for a GPU.

    The layout is in it since a processor's programs were once compiled for convolutions whose channels come first.
    """
    if device.type != "cuda":
        return f"{platform.machine()}-fp32-nhwc"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{platform.machine()}-sm{major}{minor}-fp16"


def machine_of(device: torch.device) -> dict[str, Any]:
    """What compiled code needs: this version of PyTorch, a processor with all that this one has, this kind of GPU."""
    needs = {"torch": torch.__version__, "processor": platform.machine(), "features": sorted(_features())}
    if device.type == "cuda":
        needs["card"] = torch.cuda.get_device_name(device)  # told, not compared: its capability is in the form
    return needs | {"form": form_of(device)}


def _features() -> set[str]:
    """The processor's instruction sets, as Linux names them: code compiled with one runs only where it is there."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def folder_of(base: Path, device: torch.device) -> Path:
    """Where the programs of a base for a device of this machine lie, beside those for others."""
    return base / ENGINES / f"{TARGET}-{torch.__version__.replace('+', '-')}-{form_of(device)}"


def why_not(base: Path, _info: ClipInfo, device: torch.device) -> str | None:
    """Why a base cannot be served by compiled programs here; None where it can."""
    if device.type not in ("cpu", "cuda"):
        return f"programs are compiled for processors and CUDA, not for {device.type}"
    folder = folder_of(base, device)
    if not (folder / MANIFEST).is_file():
        others = ", ".join(path.parent.name for path in sorted((base / ENGINES).glob(f"{TARGET}-*/{MANIFEST}")))
        return (
            f"no programs for torch {torch.__version__} on {form_of(device)}{others and f' (there are {others})'}; "
            f"python -m tav_opt.export … --target {TARGET} makes them"
        )
    manifest = layout.manifest(folder, ProgramsManifest)
    if manifest["made_of"] != layout.manifest(base)["files"]:
        return "its programs were made of other graphs than the base has now: export again"
    if lacking := set(manifest["machine"]["features"]) - _features():
        return f"its programs need a processor with {' '.join(sorted(lacking))}: export again on this machine"
    return None


def needed_bytes(base: Path, _info: ClipInfo, device: torch.device) -> int:
    """What opening it takes in memory."""
    folder = folder_of(base, device)
    return sum((folder / file).stat().st_size for file in layout.manifest(folder, ProgramsManifest)["files"])


class CompiledGraphs:
    """The programs of one base; see `exported.Graphs`.

    On CUDA each is a CUDA graph for every number of rows that it is called with: all read one copy of a clip's values,
    and all of the UNet's one copy of its weights.
    """

    frames_at_once = 4
    has_threads = False
    made_by = f"--target {TARGET}"

    def __init__(
        self,
        base: Path,
        _info: ClipInfo,
        device: torch.device,
        _threads: int | None = None,
        *,
        folder: Path | None = None,
    ) -> None:
        """`folder`: of programs that do not have their place yet."""
        self.device = device
        own = specs.read(base)
        self._folder = folder = folder or folder_of(base, device)
        check_unaltered(folder, (WEIGHTS, *(f"{name}.pt2" for name in own)))
        self.revision = revision_of(layout.manifest(folder, ProgramsManifest)["files"])
        self._added = made_of_added(folder, base)
        self._specs = own | {name: spec for name, spec in specs.added(base).items() if name in self._added}
        # Of the same graphs.
        self._working = {name: WorkingMemory.of(base / spec.file) for name, spec in self._specs.items()}
        self._lock = threading.Lock()
        self._weights = on_device(load_tensors(folder / WEIGHTS), device)
        self._programs = {name: opened(folder / f"{name}.pt2", name, self._weights, device) for name in own}
        half = precision_of(device) == torch.float16
        self._runner: Runner = OnGpu(self._programs, device) if half else Direct(self._programs)

    def of_clip(self, values: Mapping[str, Tensor]) -> tuple[Mapping[str, Call], int]:
        own = {name: value.to(self.device, precision_of(self.device)) for name, value in values.items()}
        calls: dict[str, Call] = {name: partial(self._run, spec, own) for name, spec in self._specs.items()}
        calls |= {name: Late(partial(self._ready, self._specs[name], own)) for name in self._added}
        return calls, sum(value.nbytes for value in own.values())

    def _ready(self, spec: GraphSpec, own: dict[str, Tensor]) -> Call:
        """A program that was added, opened for the first clip that asks for it."""
        with self._lock:
            if spec.name not in self._programs:
                check_added(self._folder, spec.name)
                weights = with_unets(spec, self._weights)
                if own_weights(spec.name) in self._added[spec.name]["files"]:
                    weights |= on_device(load_tensors(self._folder / own_weights(spec.name)), self.device)
                self._programs[spec.name] = opened(self._folder / f"{spec.name}.pt2", spec.name, weights, self.device)
        return partial(self._run, spec, own)

    def _run(self, spec: GraphSpec, own: dict[str, Tensor], **inputs: Tensor) -> dict[str, Tensor]:
        with self._lock, torch.no_grad():
            return self._runner(spec, inputs, own if spec.values else None)

    def extra_bytes(self, items: Mapping[str, int]) -> int:
        """Of the largest: what a program takes it gives back before the next one runs, or shares with it.

        And of those that are yet to be opened, what they have beside the UNet's weights.
        """
        unopened = [self._added[name]["files"] for name in items if name in self._added and name not in self._programs]
        loaded = sum((self._folder / file).stat().st_size for files in unopened for file in files)
        return loaded + max(self._working[name].bytes(count) for name, count in items.items())


class Runner(Protocol):
    """How programs are run."""

    def __call__(
        self, spec: GraphSpec, inputs: Mapping[str, Tensor], values: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """A program on inputs by name and the clip's values, if it takes them → its outputs: fp32, fresh memory."""


class Direct:
    """Programs of processors: they read whatever tensors they are given."""

    def __init__(self, programs: Mapping[str, Any]) -> None:
        self._programs = programs

    def __call__(
        self, spec: GraphSpec, inputs: Mapping[str, Tensor], values: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        given = {} if values is None else {"values": values}
        return spec.by_name(self._programs[spec.name](*(inputs[x.name].contiguous() for x in spec.inputs), **given))


class OnGpu:
    """fp16 programs as CUDA graphs over fixed buffers, which share the memory that they work in."""

    def __init__(self, programs: Mapping[str, Any], device: torch.device) -> None:
        self._programs, self._device = programs, device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._replayed: dict[tuple[str, int], Replayed] = {}
        self._values: SharedValues | None = None

    def __call__(
        self, spec: GraphSpec, inputs: Mapping[str, Tensor], values: dict[str, Tensor] | None
    ) -> dict[str, Tensor]:
        if values is not None:
            if self._values is None:
                self._values = SharedValues({own: torch.empty_like(value) for own, value in values.items()})
            self._values.hold(values, values)
        key = spec.name, len(inputs[spec.inputs[0].name])
        if key not in self._replayed:
            self._replayed[key] = self._fixed(spec, inputs)
        outputs = spec.by_name(self._replayed[key](inputs))
        return {name: output.to(torch.float32, copy=True) for name, output in outputs.items()}

    def _fixed(self, spec: GraphSpec, like: Mapping[str, Tensor]) -> Replayed:
        buffers = {
            x.name: torch.empty(
                like[x.name].shape,
                dtype=torch.float16 if x.dtype == "float32" else getattr(torch, x.dtype),
                device=self._device,
            )
            for x in spec.inputs
        }
        given = {"values": self._values.buffers} if spec.values and self._values is not None else {}
        launch = partial(self._programs[spec.name], *buffers.values(), **given)
        return Replayed(launch, buffers, self._device, self._pool)


def with_unets(spec: GraphSpec, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the base's own UNet by the names that another program of it has them by."""
    if not spec.is_unet:
        return {}
    own = {name.removeprefix("unet."): weight for name, weight in weights.items() if name.startswith("unet.")}
    return {f"{spec.name}.{name}": weight for name, weight in own.items()}


def opened(path: Path, name: str, weights: Mapping[str, Tensor], device: torch.device) -> Any:
    """A program with its weights; those that `on_device` has laid out it shares with whoever else holds them."""
    import tav_opt.kernels.sparse_causal
    import tav_opt.kernels.temporal  # noqa: F401

    # On CUDA its own threading would ask for events, which a CUDA graph may not hold.
    single, index = device.type == "cuda", device.index or 0 if device.type == "cuda" else -1
    try:
        program = torch._inductor.aoti_load_package(str(path), run_single_threaded=single, device_index=index)
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from None
    own = {fqn: laid_out(weights[f"{name}.{fqn}"], device) for fqn in program.get_constant_fqns()}
    program.load_constants(own, check_full_update=True, user_managed=True)
    return program


def on_device(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Weights as programs read them."""
    return {name: laid_out(weight, device) for name, weight in weights.items()}


def laid_out(weight: Tensor, device: torch.device) -> Tensor:
    """A weight on its device as the programs were compiled for it: a convolution's channels come last."""
    return weight.to(device, memory_format=torch.channels_last if weight.ndim == 4 else torch.preserve_format)
