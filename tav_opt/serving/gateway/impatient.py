"""HTTP connections that ask for nothing are closed: as many as there may be would else keep everyone out."""

from __future__ import annotations

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tav_opt.serving.gateway.settings import KEEPALIVE_SECONDS


class Impatient(H11Protocol):
    """A connection whose next request, to the end of its head, does not come within twice LOOK_SECONDS is closed."""

    LOOK_SECONDS = KEEPALIVE_SECONDS / 2

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look(None)

    def _look(self, before: object) -> None:
        if self.transport.is_closing():
            return
        state = self.conn.their_state, self.cycle
        if state == before and self.conn.their_state is h11.IDLE:
            self.transport.close()
        else:
            self.loop.call_later(self.LOOK_SECONDS, self._look, state)
