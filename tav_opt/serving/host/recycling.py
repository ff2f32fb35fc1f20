"""A server that has grown past its limit is started anew: between two edits, or amid them where they never pause."""

from __future__ import annotations

import sys
import time

from tav_opt.serving.host.server import Server

LOOK_SECONDS = 5.0
"""Between two looks at the memory, which cost the kernel a walk over its pages."""
PATIENCE_SECONDS = 60.0
"""How long a moment without edits is waited for."""


class Growth:
    """How far a server is past `config.recycle_mib`, the limit of what it may hold."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._limit = server.config.recycle_mib << 20
        self._held = 0
        self._next_look = 0.0
        self._outgrown_since: float | None = None
        self._warned = False

    def is_due(self) -> bool:
        """Whether the server is to be started anew now, which does not help one that never edited."""
        now = time.monotonic()
        if self._limit and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._held = self._server.held_bytes()
            self._outgrown_since = (self._outgrown_since or now) if self._held > self._limit else None
        if self._outgrown_since is None:
            return False
        if not self._server.has_edited:
            self._warn()
            return False
        return self._server.idle_seconds() > 0 or now - self._outgrown_since > PATIENCE_SECONDS

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            print(
                f"tav-opt serve: the server holds {self._held >> 20} MiB before its first edit: --recycle-mib "
                f"{self._limit >> 20} starts it anew after every edit",
                file=sys.stderr,
                flush=True,
            )

    def __str__(self) -> str:
        return f"the server holds {self._held >> 20} MiB, over --recycle-mib {self._limit >> 20}: it is started anew"
