"""uvicorn, which leaves signals to the process that it is a part of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn


class Quiet(uvicorn.Server):
    """Signals are the process's own to take note of."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
