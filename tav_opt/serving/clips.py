"""The exported clips: found when asked for, loaded while they are used, gone when their folder is."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tav_opt.contract import CLIP_NAME, ClipInfo, check_clip_name
from tav_opt.engines.onnxruntime import MANIFEST, OnnxBase, OnnxEngine
from tav_opt.files import read_json
from tav_opt.free_memory import free_bytes
from tav_opt.serving.failures import Unavailable, UnknownClip
from tav_opt.serving.memory import Memory

Stamp = tuple[int, int]
CPU = torch.device("cpu")

REPLACED_SECONDS = 0.02
"""How long an export needs, at most, between taking the old clip away and putting the new one in its place."""
WEIGHTS = 2
"""ONNX Runtime holds a graph's weights and, laid out anew, copies of them."""


@dataclass(frozen=True)
class _Resident:
    stamp: Stamp
    engine: OnnxEngine


class Clips:
    """The clips of a version folder. Those used lately stay loaded, up to `limit` bytes; one base serves all of its.

    One at a time may ask.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit: int,
        device: torch.device = CPU,
        threads: int | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._folder, self._limit = folder, limit
        self._device, self._threads = device, threads
        self._memory = memory or Memory(partial(free_bytes, device))
        self._bases: dict[str, OnnxBase] = {}
        self._open: OrderedDict[str, _Resident] = OrderedDict()

    def names(self) -> list[str]:
        """Of all clips that are there now."""
        found = (path.parent.name for path in self._folder.glob(f"clips/*/{MANIFEST}"))
        return sorted(name for name in found if CLIP_NAME.match(name))

    def resident(self) -> tuple[int, int]:
        """How many clips are loaded, and the bytes of their values and latents."""
        return len(self._open), sum(clip.engine.nbytes for clip in self._open.values())

    def get(self, name: str) -> OnnxEngine:
        """The engine of a clip, opened anew where it was exported anew.

        Raises UnknownClip, Unavailable where memory is short of its base, and RuntimeError for a damaged clip.
        """
        self._forget_removed()
        stamp = self._stamp(name)
        found = self._open.get(name)
        while found is None or found.stamp != stamp:
            try:
                found = _Resident(stamp, self._opened(name))
            except (Unavailable, MemoryError):
                raise
            except Exception as error:  # whatever lies in that folder
                if (now := self._stamp(name)) == stamp:
                    # The client gave nothing wrong: not an InputError any more.
                    raise RuntimeError(f"clip {name} cannot be opened: {error}") from error
                stamp = now  # replaced while it was read
        self._open[name] = found
        self._open.move_to_end(name)
        self._shrink()
        return found.engine

    def _stamp(self, name: str) -> Stamp:
        if CLIP_NAME.match(name):
            for wait in (REPLACED_SECONDS, 0):
                if (stamp := _stamp(self._manifest(name))) is not None:
                    return stamp
                time.sleep(wait)
        raise UnknownClip(f"clip {name[:63]!r} is unknown; exported are: {', '.join(self.names()) or 'none'}")

    def _manifest(self, name: str) -> Path:
        return self._folder / "clips" / check_clip_name(name) / MANIFEST

    def _opened(self, name: str) -> OnnxEngine:
        manifest = self._manifest(name)
        base = ClipInfo.from_json(read_json(manifest)).exported_base
        if base not in self._bases:
            folder = self._folder / "base" / base
            with self._memory.promised(partial(self._make_room, folder)):
                self._bases[base] = OnnxBase.open(folder, threads=self._threads, device=self._device)
        return OnnxEngine.open(manifest.parent, self._bases[base])

    def _make_room(self, folder: Path) -> int:
        """Closes other bases, while memory is short of the bytes that one to be opened needs, which it returns."""
        needed = WEIGHTS * sum(path.stat().st_size for path in folder.glob("*"))
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
        for name in [name for name, clip in self._open.items() if _stamp(self._manifest(name)) != clip.stamp]:
            del self._open[name]
        for base in [base for base in self._bases if not (self._folder / "base" / base).is_dir()]:
            self._drop_base(base)

    def _shrink(self) -> None:
        while len(self._open) > 1 and self.resident()[1] > self._limit:
            self._open.popitem(last=False)


def _stamp(manifest: Path) -> Stamp | None:
    """Another for every export; None where there is none."""
    try:
        found = manifest.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
