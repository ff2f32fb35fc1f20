"""Exported graphs in ONNX Runtime: one set of sessions a base, shared by all clips tuned on it."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tav_opt.config import InputError
from tav_opt.contract import ClipInfo
from tav_opt.engines.exported import Call, Late, usable_cores
from tav_opt.memory.graph import WorkingMemory, weights_bytes
from tav_opt.repository import layout, specs
from tav_opt.repository.layout import ENGINES, check_added, check_unaltered, made_of_added
from tav_opt.repository.specs import GraphSpec, TensorSpec
from tav_opt.schemas import ProgramsManifest

CUDA = "CUDAExecutionProvider"

HALF_UNET = "unet.fp16.onnx"
"""The UNet in fp16 that GPUs take where it was exported; its weights lie beside it."""


def half_file(name: str) -> str:
    """The file of a graph that was added to the base, in fp16, beside the UNet's."""
    return f"{name}.fp16.onnx"


def half_folder(base: Path) -> Path:
    """Where the fp16 UNet of a base lies, if it has one."""
    return base / ENGINES / "onnxruntime-fp16"


def half_does_not_fit(base: Path) -> str | None:
    """Why the fp16 UNet of a base is not to be used; None where it is, or where there is none."""
    folder = half_folder(base)
    if folder.is_dir() and _made_of(folder) != layout.manifest(base)["files"]:
        return "its fp16 graph was made of other graphs than the base has now: export again with --half"
    return None


def _made_of(folder: Path) -> dict[str, str]:
    found: dict[str, str] = layout.manifest(folder, ProgramsManifest)["made_of"]
    return found


def precision(base: Path, device: torch.device) -> str:
    """What the UNet of a base computes in on a device."""
    return "fp16" if device.type == "cuda" and half_folder(base).is_dir() else "fp32"


def graph_files(base: Path, device: torch.device) -> dict[str, tuple[Path, GraphSpec]]:
    """The graphs that are run on a device, by name."""
    found = {name: (base / spec.file, spec) for name, spec in specs.read(base).items()}
    if precision(base, device) == "fp16":
        path = half_folder(base) / HALF_UNET
        inputs = {parameter: value.name for parameter, value in found["unet"][1].values.items()}
        found["unet"] = path, specs.of_onnx(path, inputs)
    return found


def added_files(base: Path, device: torch.device) -> dict[str, tuple[Path, GraphSpec]]:
    """The graphs that were added to a base and are run on a device, by name: in fp16 where its own UNet is."""
    found = specs.added(base)
    if precision(base, device) != "fp16":
        return {name: (base / spec.file, spec) for name, spec in found.items()}
    folder = half_folder(base)
    return {name: (folder / half_file(name), _in_half(found[name])) for name in made_of_added(folder, base)}


def _in_half(spec: GraphSpec) -> GraphSpec:
    """Of its tensors, a clip's values alone are fp16."""
    return replace(spec, values={name: replace(value, dtype="float16") for name, value in spec.values.items()})


@cache
def check_one() -> None:
    """Raises InputError where several distributions of onnxruntime are installed.

    They write over each other's files, so that the order of installation decides which of them runs, or a mixture.
    """
    installed = sorted(set(metadata.packages_distributions().get("onnxruntime", [])))
    if len(installed) > 1:
        raise InputError(
            f"{' and '.join(installed)} are both installed and overwrite each other: pip uninstall --yes "
            f"{' '.join(installed)}, then pip install 'tav-opt[cpu]' or 'tav-opt[gpu]', not both"
        )


def load_onnxruntime() -> Any:
    """The package, imported; raises InputError where it is not installed, and as check_one does."""
    check_one()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.32 on it would tell its maker of each use
    try:
        import onnxruntime
    except ImportError:
        raise InputError("onnxruntime is not installed: pip install 'tav-opt[cpu]', or [gpu]") from None
    return onnxruntime


def sees_no_gpu_though_built_for_one() -> str | None:
    """One line where onnxruntime is built for GPUs and PyTorch has none; raises InputError as check_one does."""
    check_one()
    try:
        built = CUDA in load_onnxruntime().get_available_providers()
    except InputError:
        return None
    if not built or torch.cuda.is_available():
        return None
    return (
        f"onnxruntime is built for GPUs, but PyTorch {torch.__version__} sees none: edits run on the CPU; "
        "python -c 'import torch; torch.cuda.init()' says why"
    )


def session(path: Path, device: torch.device, threads: int | None = None, *, tf32: bool = False) -> Any:
    """Opens an ONNX file; `tf32` gives a GPU's matrix units the products of fp32.

    Raises InputError as load_onnxruntime does, and where CUDA is asked for and cannot be had.
    """
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Left to itself, onnxruntime pins a thread to every core of the machine, also to those it may not use.
    options.intra_op_num_threads = threads or usable_cores()
    # With patterns the second run of a shape asks for all of its memory in one piece, beside what the first left.
    options.enable_mem_pattern = False
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        onnxruntime.preload_dlls()
        # By default every new shape, the first inversion's too, would wait for trials of all algorithms.
        search = {"cudnn_conv_algo_search": "HEURISTIC"}
        providers.insert(0, (CUDA, {"device_id": device.index or 0, "use_tf32": int(tf32)} | search))
    opened = onnxruntime.InferenceSession(path, options, providers=providers)
    # Without a provider's libraries onnxruntime takes the next one, to which CUDA's pointers must not be given.
    if device.type == "cuda" and CUDA not in opened.get_providers():
        raise InputError(
            f"{device}: onnxruntime {onnxruntime.__version__} cannot load its CUDA libraries: "
            "pip install 'tav-opt[gpu]' brings them; the driver must know that CUDA"
        )
    return opened


def why_not(base: Path, _info: ClipInfo, device: torch.device) -> str | None:
    """Why onnxruntime cannot serve on a device; None where it can."""
    try:
        found = load_onnxruntime().get_available_providers()
    except InputError as error:
        return str(error)
    if device.type == "cuda" and CUDA not in found:
        return (
            "onnxruntime is built for processors; for the GPU: pip uninstall --yes onnxruntime, then "
            "pip install 'tav-opt[gpu]'"
        )
    return half_does_not_fit(base) if device.type == "cuda" else None


def needed_bytes(base: Path, _info: ClipInfo, device: torch.device) -> int:
    """What opening a base takes in memory: the weights and, laid out anew, copies of them."""
    return 2 * sum(weights_bytes(path) for path, _ in graph_files(base, device).values())


class Bound:
    """A session whose tensors lie in PyTorch's memory, on its device: nothing is copied in or out.

    `values` stay bound from call to call. One call at a time.
    """

    def __init__(
        self, session: Any, spec: GraphSpec, device: torch.device, values: Mapping[str, Tensor] | None = None
    ) -> None:
        self._session, self._spec, self._device = session, spec, device
        self._binding = session.io_binding()
        self._values = {
            value.name: self._bind_input(value.name, (values or {})[value.name]) for value in spec.values.values()
        }
        self._lock = threading.Lock()

    def _bind_input(self, name: str, value: Tensor) -> Tensor:
        value = value.to(self._device).contiguous()
        self._binding.bind_input(name, *self._place_of(value))
        return value

    def _bind_output(self, spec: TensorSpec, rows: int) -> Tensor:
        output = torch.empty(spec.fixed(rows), dtype=getattr(torch, spec.dtype), device=self._device)
        self._binding.bind_output(spec.name, *self._place_of(output))
        return output

    def _place_of(self, tensor: Tensor) -> tuple[Any, ...]:
        dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        return self._device.type, self._device.index or 0, dtype, tuple(tensor.shape), tensor.data_ptr()

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The graph's outputs; their free first axis is as long as the inputs'."""
        with self._lock:
            held = [self._bind_input(name, value) for name, value in inputs.items()]  # alive until the run ends
            outputs = {spec.name: self._bind_output(spec, held[0].shape[0]) for spec in self._spec.outputs}
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # onnxruntime works on a stream of its own
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
            return outputs


class OnnxGraphs:
    """The sessions of one base; see `exported.Graphs`."""

    frames_at_once = 4
    has_threads = True
    made_by = "--half"
    """In fp16; those of fp32 are there."""

    def __init__(self, folder: Path, _info: ClipInfo, device: torch.device, threads: int | None = None) -> None:
        self.device = device
        self.revision = precision(folder, device)
        half = self.revision == "fp16"
        if half:
            check_unaltered(half_folder(folder), (HALF_UNET,))
        self._open = partial(session, device=device, threads=threads, tf32=half)
        found, self._added = graph_files(folder, device), added_files(folder, device)
        self._specs = {name: spec for name, (_, spec) in (found | self._added).items()}
        self._sessions = {name: self._open(path) for name, (path, _) in found.items()}
        # The fp32 graph's is a bound of the fp16 graph's.
        self._working = {name: WorkingMemory.of(folder / f"{name}.onnx") for name in self._specs}
        self._held = dict.fromkeys(self._specs, 0)  # that each arena has grown to by its largest run; it keeps them
        self._opening = threading.Lock()

    def of_clip(self, values: Mapping[str, Tensor]) -> tuple[Mapping[str, Call], int]:
        taken = {value.name: value.dtype for spec in self._specs.values() for value in spec.values.values()}
        own = {name: values[name].to(getattr(torch, dtype)) for name, dtype in taken.items()}
        calls: dict[str, Call] = {name: self._bound(name, own) for name in self._sessions}
        calls |= {name: Late(partial(self._bound, name, own)) for name in self._added if name not in calls}
        return calls, sum(value.nbytes for value in own.values())

    def _bound(self, name: str, own: Mapping[str, Tensor]) -> Call:
        """A graph with a clip's values; one that was added is opened for the first clip that asks for it."""
        with self._opening:
            if name not in self._sessions:
                path = self._added[name][0]
                check_added(path.parent, name)
                self._sessions[name] = self._open(path)
        return partial(self._run, name, Bound(self._sessions[name], self._specs[name], self.device, own))

    def _run(self, name: str, graph: Bound, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = graph(**inputs)
        rows = next(iter(inputs.values())).shape[0]
        self._held[name] = max(self._held[name], self._working[name].bytes(rows))
        return outputs

    def extra_bytes(self, items: Mapping[str, int]) -> int:
        working = sum(max(0, self._working[name].bytes(count) - self._held[name]) for name, count in items.items())
        unopened = [path for name, (path, _) in self._added.items() if name in items and name not in self._sessions]
        return working + sum(2 * weights_bytes(path) for path in unopened)
