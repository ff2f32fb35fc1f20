"""Inverted latents by what they were computed from: in memory, and on disk across restarts and model instances."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tav_opt.config import InputError, InversionConfig
from tav_opt.files import whole

Found = Literal["memory", "disk", "computed"]
LOCK_POLL_SECONDS = 0.02


def key(revision: str, inversion: InversionConfig, source: str) -> str:
    """Of inverted latents: a clip's revision, how it was inverted, and the source's content."""
    return hashlib.sha256(f"{revision} {inversion.key} {source}".encode()).hexdigest()


class Inversions:
    """A cache of latents, bounded in memory and on disk; what was used longest ago goes first.

    Of several that ask for the same at once, threads or processes that share the folder, one computes it. Without a
    folder nothing is kept on disk. A folder that cannot be written is no error: `on_trouble` is told.
    """

    def __init__(
        self,
        *,
        memory_limit: int,
        folder: Path | None = None,
        disk_limit: int = 0,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder, self._disk_limit, self._memory_limit = folder, disk_limit, memory_limit
        self._on_trouble = on_trouble
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.RLock()
        self._asked: set[str] = set()
        """What a thread of this process looks for, or computes."""

    def memory_bytes(self) -> int:
        with self._lock:
            return sum(latents.nbytes for latents in self._kept.values())

    def disk_bytes(self) -> int:
        return sum(size for _, size, _ in self._files())

    def get(
        self, name: str, compute: Callable[[], Tensor], keep_waiting: Callable[[], None] = lambda: None
    ) -> tuple[Tensor, Found]:
        """The latents of `key(…)`, and where they came from.

        Who waits for another's computation calls `keep_waiting` every LOCK_POLL_SECONDS; what that and `compute` raise
        goes through, and leaves nothing behind.
        """
        if (found := self._from_memory(name)) is not None:
            return found, "memory"
        with self._alone(name, keep_waiting), self._locked(name, keep_waiting):
            if (found := self._from_memory(name)) is not None:
                return found, "memory"
            if (found := self._read(name)) is not None:
                self._keep(name, found)
                return found, "disk"
            latents = compute()
            self._keep(name, latents)
            self._write(name, latents)
            return latents, "computed"

    def _from_memory(self, name: str) -> Tensor | None:
        with self._lock:
            if (found := self._kept.get(name)) is None:
                return None
            self._kept.move_to_end(name)
        if self._folder is not None:
            with suppress(OSError):
                os.utime(self._path(self._folder, name))  # in use there, too
        return found

    def _keep(self, name: str, latents: Tensor) -> None:
        if latents.nbytes > self._memory_limit:
            return
        with self._lock:
            self._kept[name] = latents
            while self.memory_bytes() > self._memory_limit:
                self._kept.popitem(last=False)

    @contextmanager
    def _alone(self, name: str, keep_waiting: Callable[[], None]) -> Iterator[None]:
        """Among the threads of this process."""
        while not self._claimed(name):
            keep_waiting()
            time.sleep(LOCK_POLL_SECONDS)
        try:
            yield
        finally:
            with self._lock:
                self._asked.remove(name)

    def _claimed(self, name: str) -> bool:
        with self._lock:
            if name in self._asked:
                return False
            self._asked.add(name)
            return True

    @contextmanager
    def _locked(self, name: str, keep_waiting: Callable[[], None]) -> Iterator[None]:
        try:
            file = None if self._folder is None else self._lock_file(self._folder, name).open("w")
        except OSError as error:
            self._on_trouble(f"the cache's folder cannot be used: {error}")
            file = None
        if file is None:
            yield
            return
        with file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    keep_waiting()
                    time.sleep(LOCK_POLL_SECONDS)
            yield

    def _lock_file(self, folder: Path, name: str) -> Path:
        """One of 256, which stay: a lock file that is deleted locks nothing."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder / f".lock-{name[:2]}"

    def _path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}.safetensors"

    def _read(self, name: str) -> Tensor | None:
        """None where there is none, or not the one that was written."""
        if self._folder is None:
            return None
        path = self._path(self._folder, name)
        try:
            with safe_open(path, framework="pt") as file:
                latents = file.get_tensor("latents")
                if (file.metadata() or {}).get("sha256") != _digest(latents):
                    raise SafetensorError("its content is not what was written")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            self._on_trouble(f"{path.name} is left out: {error}")
            return None
        return latents

    def _write(self, name: str, latents: Tensor) -> None:
        if self._folder is None or latents.nbytes > self._disk_limit:
            return
        latents = latents.cpu().contiguous()
        try:
            with whole(self._path(self._folder, name)) as temporary:
                safetensors.torch.save_file({"latents": latents}, temporary, {"sha256": _digest(latents)})
            self._evict()
        except (OSError, InputError, SafetensorError) as error:  # a full disk, above all
            self._on_trouble(f"an inversion is not kept on disk: {error}")

    def _evict(self) -> None:
        files = sorted(self._files())
        excess = sum(size for _, size, _ in files) - self._disk_limit
        for _, size, path in files:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """When it was last used, bytes, path."""
        for path in self._folder.glob("*.safetensors") if self._folder is not None else ():
            with suppress(OSError):  # gone meanwhile
                found = path.stat()
                yield found.st_mtime_ns, found.st_size, path


def _digest(latents: Tensor) -> str:
    return hashlib.sha256(latents.cpu().contiguous().numpy().tobytes()).hexdigest()
