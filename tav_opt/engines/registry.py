"""Which engines there are, which of them can serve a base on a device, and why the others cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from tav_opt.clip_folder import ClipFolder
from tav_opt.config import Additions, EngineChoice, EngineName, InputError, PathLike
from tav_opt.contract import ClipInfo
from tav_opt.device import dtype_on, usable_device
from tav_opt.engines import Engine
from tav_opt.engines.exported import ExportedBase, ExportedEngine, Graphs
from tav_opt.repository.layout import base_of, find_clip, info_of

_LOG = logging.getLogger(__name__)

ORDER: dict[str, tuple[EngineName, ...]] = {
    "cuda": ("tensorrt", "compiled", "onnxruntime", "pytorch"),
    "cpu": ("onnxruntime", "compiled", "pytorch"),
}
"""By preference; on processors onnxruntime was the fastest wherever it was measured (benchmarks/latency.py)."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One engine: how it is asked, and opened, for a base folder, a clip of it, and a device."""

    why_not: Callable[[Path, ClipInfo, torch.device], str | None]
    """The reason why it cannot serve the base there; None where it can."""
    needed_bytes: Callable[[Path, ClipInfo, torch.device], int]
    """Memory that opening the base takes."""
    open: Callable[[Path, ClipInfo, torch.device, int | None], Graphs]
    """The last argument: threads, every core where it is None."""
    precision: Callable[[Path, torch.device], str] = lambda _base, _device: "fp32"
    """What the UNet computes in."""


def kind(name: EngineName) -> Kind:
    """The engine of that name; its runtime is imported now, and not before."""
    match name:
        case "tensorrt":
            from tav_opt.engines import tensorrt as module

            return Kind(
                why_not=module.why_not,
                needed_bytes=module.needed_bytes,
                open=module.TensorRtGraphs.of,
                precision=lambda _base, _device: "fp16",
            )
        case "compiled":
            from tav_opt.engines import compiled

            return Kind(
                why_not=compiled.why_not,
                needed_bytes=compiled.needed_bytes,
                open=compiled.CompiledGraphs,
                precision=compiled.precision,
            )
        case "onnxruntime":
            from tav_opt.engines import onnxruntime

            return Kind(
                why_not=onnxruntime.why_not,
                needed_bytes=onnxruntime.needed_bytes,
                open=onnxruntime.OnnxGraphs,
                precision=onnxruntime.precision,
            )
        case "pytorch":
            return _pytorch()


def _pytorch() -> Kind:
    try:
        from tav_opt.engines import pytorch
    except ImportError as error:  # a serving machine needs neither diffusers nor transformers
        reason = f"{error.name} is not installed"
        return Kind(why_not=lambda *_: reason, needed_bytes=lambda *_: 0, open=lambda *_: _refuse(reason))
    model = pytorch.ModelOfBase()
    return Kind(why_not=model.why_not, needed_bytes=model.needed_bytes, open=model.open)


def _refuse(reason: str) -> Graphs:
    raise InputError(reason)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The engine that serves a base on a device, and why each better one does not."""

    engine: EngineName
    kind: Kind
    device: torch.device
    precision: str = "fp32"
    passed_over: dict[EngineName, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = "".join(f"; {name}: {reason}" for name, reason in self.passed_over.items())
        half = "" if self.precision == "fp32" else f" {self.precision}"
        return f"{self.engine}{half} on {self.device}{reasons}"


def best_device(on_trouble: Callable[[str], object] = _LOG.warning) -> torch.device:
    """The GPU where PyTorch has one; `on_trouble` is told where onnxruntime alone is built for one.

    Raises InputError where several distributions of onnxruntime are installed.
    """
    from tav_opt.engines.onnxruntime import sees_no_gpu_though_built_for_one

    if trouble := sees_no_gpu_though_built_for_one():
        on_trouble(trouble)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose(base: Path, info: ClipInfo, device: torch.device, engine: EngineChoice = "auto") -> Choice:
    """The best engine that can serve a base on a device, or the one that is named.

    Raises InputError, with the reasons, where none can, or the named one cannot: nothing else takes its place.
    """
    names = ORDER[device.type] if engine == "auto" else (engine,)
    reasons: dict[EngineName, str] = {}
    for name in names:
        asked = kind(name)
        if (reason := asked.why_not(base, info, device)) is None:
            precision = asked.precision(base, device)
            return Choice(engine=name, kind=asked, device=device, precision=precision, passed_over=reasons)
        reasons[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise InputError(f"no engine for base {base.name} on {device}: {told}")


def needed_bytes(base: Path, info: ClipInfo, choice: Choice) -> int:
    """Memory that opening a base by the chosen engine takes."""
    return choice.kind.needed_bytes(base, info, choice.device)


def open_base(base: Path, info: ClipInfo, choice: Choice, *, threads: int | None = None) -> ExportedBase:
    """Opens `base/<…>` by the chosen engine; raises InputError as `ExportedBase.open` does."""
    return ExportedBase.open(base, choice.engine, partial(choice.kind.open, base, info, choice.device, threads))


def load(
    folder: PathLike | ClipFolder,
    *,
    engine: EngineChoice = "auto",
    device: str = "auto",
    dtype: torch.dtype | None = None,
    base: PathLike | Additions | None = None,
    controlnets: Mapping[str, PathLike] = MappingProxyType({}),
    adapters: Mapping[str, PathLike] = MappingProxyType({}),
) -> Engine:
    """A tuned clip, ready to be edited: a checkpoint in eager PyTorch, an exported clip by the best engine.

    `dtype` is a checkpoint's, the device's own unless given (device.dtype_on), `base` where its base model is now: a
    path, or config.Additions where what was added to it has moved. `controlnets` and `adapters` are directories, hub
    ids or files by the names that edits call them by; those of an exported clip were exported with its base. Raises
    InputError when something is missing, altered, or does not belong together, and for an engine that cannot run it.
    """
    clip = ClipFolder.at(folder)
    if not clip.exported:
        if engine not in ("auto", "pytorch"):
            hint = "python -m tav_opt.export exports it"
            raise InputError(
                f"{clip.path} is a checkpoint, which eager PyTorch runs; {engine} runs exported clips: {hint}"
            )
        from tav_opt.engines.pytorch import open_checkpoint

        place = usable_device(device)
        return open_checkpoint(
            clip, device=place, dtype=dtype_on(place, dtype), base=base, controlnets=controlnets, adapters=adapters
        )
    if given := [*controlnets, *adapters]:
        raise InputError(f"{given[0]}: {clip.path} is an exported clip, whose networks are exported beside it")
    if base is not None:
        said = ", ".join(base.given()) if isinstance(base, Additions) else f"base {base}"
        raise InputError(f"{said}: {clip.path} is an exported clip, whose base lies beside it")
    home = base_of(clip.path)
    choice = choose(home, clip.info, usable_device(device), engine)
    return ExportedEngine.open(clip.path, open_base(home, clip.info, choice))


def open_clip(
    repository: PathLike,
    name: str,
    *,
    engine: EngineChoice = "auto",
    device: torch.device | None = None,
    threads: int | None = None,
) -> ExportedEngine:
    """Opens an exported clip of a model repository, and its base, by the best engine or the one that is named.

    Raises InputError for a name that is not there, and as `choose`, `ExportedBase.open` and `ExportedEngine.open` do.
    """
    clip = find_clip(repository, name)
    base, info = base_of(clip), info_of(clip)
    choice = choose(base, info, device or best_device(), engine)
    return ExportedEngine.open(clip, open_base(base, info, choice, threads=threads))
