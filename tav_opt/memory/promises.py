"""A device's free memory, less what has been promised to edits: of this model instance, and of other processes."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"
PROMISES = "*.promise"


class Memory:
    """What an instance may still take, and what it has said it will.

    Instances on one device share `folder`, where each has its `name`, and decide one at a time, as their threads do. A
    promise is a number in a file that its process locks, so that it ends with the process. What has been taken of a
    promise counts twice until it ends, which errs on the safe side. Without a folder there is one edit at a time.
    """

    def __init__(self, free_bytes: Callable[[], int], folder: Path | None = None, name: str = "") -> None:
        self._free_bytes, self._folder, self._name = free_bytes, folder, name
        self._lock, self._used = threading.Lock(), set[int]()

    def free(self) -> int:
        """Bytes that nothing uses and no other instance has promised."""
        return max(0, self._free_bytes() - self._promised())

    @contextmanager
    def promised(self, choose: Callable[[], int]) -> Iterator[None]:
        """Promises, for the block, the bytes that `choose` finds by `free`; what it raises goes through."""
        if self._folder is None:
            choose()
            yield
            return
        with self._unused() as number, (self._folder / f"{self._name}-{number}.promise").open("w") as promise:
            with (self._folder / LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                promise.write(str(choose()))
                promise.flush()
                fcntl.flock(promise, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _unused(self) -> Iterator[int]:
        """The least number that no other thread has."""
        with self._lock:
            number = min(set(range(len(self._used) + 1)) - self._used)
            self._used.add(number)
        try:
            yield number
        finally:
            with self._lock:
                self._used.remove(number)

    def _promised(self) -> int:
        promised = 0
        for path in self._folder.glob(PROMISES) if self._folder is not None else ():
            with path.open() as promise:
                try:
                    fcntl.flock(promise, fcntl.LOCK_SH | fcntl.LOCK_NB)  # of nobody any more, or about to be one's own
                except BlockingIOError:
                    promised += int(promise.read())
        return promised
