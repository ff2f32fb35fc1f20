"""A device's free memory, less what other model instances of the server have promised: each is a process of its own."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"
PROMISES = "*.promise"


class Memory:
    """What an instance may still take, and what it has said it will.

    Instances on one device share `folder`, where each has its `name`, and decide one at a time. A promise is a number
    in a file that its process locks, so that it ends with the process. What has been taken of a promise counts twice
    until it ends, which errs on the safe side. Without a folder there is one instance.
    """

    def __init__(self, free_bytes: Callable[[], int], folder: Path | None = None, name: str = "") -> None:
        self._free_bytes, self._folder, self._name = free_bytes, folder, name

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
        with (self._folder / PROMISES.replace("*", self._name)).open("w") as promise:
            with (self._folder / LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                promise.write(str(choose()))
                promise.flush()
                fcntl.flock(promise, fcntl.LOCK_EX)
            yield

    def _promised(self) -> int:
        promised = 0
        for path in self._folder.glob(PROMISES) if self._folder is not None else ():
            with path.open() as promise:
                try:
                    fcntl.flock(promise, fcntl.LOCK_SH | fcntl.LOCK_NB)  # of nobody any more, or about to be one's own
                except BlockingIOError:
                    promised += int(promise.read())
        return promised
