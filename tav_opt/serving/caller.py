"""A line between two models of one server, which a caller that goes away hangs up: BLS calls cannot be cancelled.

It is a Unix socket in Linux's abstract namespace: no file, and closed by the kernel when a process dies.
"""

from __future__ import annotations

import re
import secrets
import socket

_NAME = re.compile(r"[0-9a-f]{32}\Z")


def _address(name: str) -> str:
    return f"\0tav-opt-{name}"


class Caller:
    """The end of who asks: `name` goes along with the request, and `hang_up` cancels it."""

    def __init__(self) -> None:
        self.name = secrets.token_hex(16)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(_address(self.name))
        self._socket.listen()

    def hang_up(self) -> None:
        self._socket.close()


class Line:
    """The end of who answers."""

    def __init__(self, name: object) -> None:
        """`name` came with a request: whatever is no caller's name is a line that was hung up."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._gone = False
        try:
            if not (isinstance(name, str) and _NAME.match(name)):
                raise ConnectionRefusedError
            self._socket.settimeout(1)
            self._socket.connect(_address(name))
            self._socket.setblocking(False)
        except OSError:
            self._gone = True

    def is_hung_up(self) -> bool:
        if not self._gone:
            try:
                self._gone = not self._socket.recv(1)
            except BlockingIOError:
                pass
            except OSError:
                self._gone = True
        return self._gone

    def close(self) -> None:
        self._socket.close()
