"""The exported clips: found when asked for, loaded while they are used, gone when their folder is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tav_opt.config import EngineChoice, InputError
from tav_opt.contract import ClipInfo
from tav_opt.engines import registry
from tav_opt.engines.exported import ExportedBase, ExportedEngine, usable_cores
from tav_opt.engines.registry import Choice
from tav_opt.memory.free import free_bytes
from tav_opt.memory.promises import Memory
from tav_opt.repository import layout
from tav_opt.repository.layout import base_folder, clip_folder, info_of
from tav_opt.serving.catalogue import Catalogue, Stamp
from tav_opt.serving.failures import Unavailable

CPU = torch.device("cpu")

OnChoice = Callable[[str, Choice], object]
"""Called with each base that is opened, and the engine that was chosen for it."""


@dataclass(frozen=True)
class _Resident:
    stamp: Stamp
    engine: ExportedEngine


class Clips:
    """The clips of a version folder. Those used lately stay loaded, up to `limit` bytes; one base serves all of its."""

    def __init__(
        self,
        folder: Path,
        *,
        limit: int,
        device: torch.device = CPU,
        engine: EngineChoice = "auto",
        threads: int | None = None,
        memory: Memory | None = None,
        on_choice: OnChoice = lambda _base, _choice: None,
    ) -> None:
        self._folder, self._limit = folder, limit
        self._catalogue = Catalogue(folder)
        self._device, self._engine, self._threads = device, engine, threads
        self._memory = memory or Memory(partial(free_bytes, device))
        self._on_choice = on_choice
        self._bases: dict[str, ExportedBase] = {}
        self._stamps: dict[str, Stamp | None] = {}
        """Of the bases' manifests as they were opened: another one lists graphs that came later."""
        self._open: OrderedDict[str, _Resident] = OrderedDict()
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """Of all clips that are there now."""
        return self._catalogue.names()

    def check_engine(self) -> None:
        """Raises InputError where the engine that was named cannot serve a base that is there: none takes its place."""
        if self._engine == "auto":
            return
        bases: dict[str, ClipInfo] = {}
        for name in self.names():
            with suppress(InputError):  # a damaged clip is refused when it is asked for
                info = info_of(clip_folder(self._folder, name))
                bases[info.exported_base] = info
        for base, info in bases.items():
            registry.choose(base_folder(self._folder, base), info, self._device, self._engine)

    def resident(self) -> tuple[int, int]:
        """How many clips are loaded, and the bytes of their values and latents."""
        with self._lock:
            return len(self._open), sum(clip.engine.held_bytes for clip in self._open.values())

    def get(self, name: str) -> ExportedEngine:
        """The engine of a clip, opened anew where it was exported anew.

        Raises UnknownClip, Unavailable where memory is short of its base, and RuntimeError for a damaged clip.
        """
        with self._lock:
            return self._got(name)

    def _got(self, name: str) -> ExportedEngine:
        self._forget_removed()
        stamp = self._catalogue.stamp(name)
        found = self._open.get(name)
        while found is None or found.stamp != stamp:
            try:
                found = _Resident(stamp, self._opened(name))
            except (Unavailable, MemoryError):
                raise
            except Exception as error:  # whatever lies in that folder
                if (now := self._catalogue.stamp(name)) == stamp:
                    # The client gave nothing wrong: not an InputError any more.
                    raise RuntimeError(f"clip {name} cannot be opened: {error}") from error
                stamp = now  # replaced while it was read
        self._open[name] = found
        self._open.move_to_end(name)
        self._shrink()
        return found.engine

    def _opened(self, name: str) -> ExportedEngine:
        clip = clip_folder(self._folder, name)
        info = info_of(clip)
        if info.exported_base not in self._bases:
            self._stamps[info.exported_base] = layout.stamp(base_folder(self._folder, info.exported_base))
            self._bases[info.exported_base] = self._opened_base(info)
        return ExportedEngine.open(clip, self._bases[info.exported_base])

    def _opened_base(self, info: ClipInfo) -> ExportedBase:
        folder = base_folder(self._folder, info.exported_base)
        choice = registry.choose(folder, info, self._device, self._engine)
        self._on_choice(info.exported_base, choice)
        with self._memory.promised(lambda: self._make_room(folder, registry.needed_bytes(folder, info, choice))):
            base = registry.open_base(folder, info, choice, threads=self._threads)
        torch.set_num_threads(1 if base.graphs.has_threads else self._threads or usable_cores())
        return base

    def _make_room(self, folder: Path, needed: int) -> int:
        """Closes other bases, while memory is short of the bytes that one to be opened needs, which it returns."""
        while needed > (free := self._memory.free()):
            if not self._bases:
                raise Unavailable(
                    f"opening base {folder.name} needs about {needed / 2**30:.2f} GiB, "
                    f"{self._device.type} has {free / 2**30:.2f} GiB free: try again later"
                )
            self._drop_base(next(iter(self._bases)))
        return needed

    def _drop_base(self, base: str) -> None:
        del self._bases[base]
        for name in [name for name, clip in self._open.items() if clip.engine.info.exported_base == base]:
            del self._open[name]

    def _forget_removed(self) -> None:
        for name in [name for name, clip in self._open.items() if self._catalogue.found(name) != clip.stamp]:
            del self._open[name]
        for base in [x for x in self._bases if layout.stamp(base_folder(self._folder, x)) != self._stamps[x]]:
            self._drop_base(base)

    def _shrink(self) -> None:
        while len(self._open) > 1 and self.resident()[1] > self._limit:
            self._open.popitem(last=False)
