"""What a worker tells the host that started it: what it edits with, and how many requests it has in hand.

It is a pair of sockets, of which every worker inherits one: no name, no port, and closed by the kernel with the last
process that has it. A message is one JSON object, whole or not there. The log is for people.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

VARIABLE = "TAV_OPT_HOST"
"""Of the environment: the number of the workers' socket. Where it is absent nobody listens."""
MESSAGE_BYTES = 1 << 16


class WorkerEnd:
    """The end of one model instance. Whether anybody listens, and still lives, makes no difference to it."""

    def __init__(self, instance: str) -> None:
        self._instance, self._in_hand, self._taken, self._lock = instance, 0, 0, threading.Lock()
        self._socket = _inherited(os.environ.get(VARIABLE, ""))

    def opened(self, base: str, engine: str) -> None:
        """What a base is served by, in words."""
        self._tell(base=base, engine=engine)

    def ready(self) -> None:
        """Requests may come."""
        self._count(0)

    @contextmanager
    def in_hand(self, *, probe: bool) -> Iterator[None]:
        """A request is worked on, in the block, which may be the host's own."""
        self._count(1, taken=not probe)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, more: int, *, taken: bool = False) -> None:
        with self._lock:  # a later number is sent later
            self._in_hand += more
            self._taken += taken
            self._tell(in_hand=self._in_hand, taken=self._taken)

    def _tell(self, **told: str | int) -> None:
        if self._socket is not None:
            with suppress(OSError):
                message = json.dumps({"instance": self._instance, **told}).encode()
                self._socket.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _inherited(number: str) -> socket.socket | None:
    """The socket of that number; None where it is no such socket, as in a process that inherited the name alone."""
    try:
        found = socket.socket(fileno=os.dup(int(number)))
    except (ValueError, OSError):
        return None
    return found if (found.family, found.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET) else None


class HostEnd:
    """The end of the host, which a thread reads until the last worker has gone."""

    def __init__(self) -> None:
        self._socket, self.workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        """`workers` is the socket to inherit; whoever started them closes it."""
        self._in_hand: dict[str, int] = {}
        self._idle_since: float | None = None
        self.has_taken = False
        """Whether a worker has ever had a request that was none of the host's own."""
        self.engines: dict[str, str] = {}
        """What each base is served by, in words."""
        threading.Thread(target=self._listen, daemon=True).start()

    def idle_seconds(self) -> float:
        """For how long no worker has had a request in hand; 0 while one has, and before the first is ready."""
        idle_since = self._idle_since
        return 0.0 if idle_since is None else time.monotonic() - idle_since

    def _listen(self) -> None:
        with self._socket:
            while message := self._socket.recv(MESSAGE_BYTES):
                self._take(json.loads(message))

    def _take(self, told: dict[str, str | int]) -> None:
        match told:
            case {"base": str(base), "engine": str(engine)}:
                self.engines[base] = engine
            case {"instance": str(instance), "in_hand": int(count), "taken": int(taken)}:
                self._in_hand[instance] = count
                self.has_taken = self.has_taken or taken > 0
                self._idle_since = None if any(self._in_hand.values()) else time.monotonic()
