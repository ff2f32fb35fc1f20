"""What needs no secrets: Triton's metrics, and whether the server really edits."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tav_opt.loopback import urlopen
from tav_opt.serving.gateway.behind import Triton
from tav_opt.serving.host.probe import Health, probe

HEALTH_SECONDS = 1.0
"""A health that is not older is told again: whoever asks often costs the worker nothing."""


class Pages:
    """The application; `app` is its ASGI callable."""

    def __init__(self, triton: Triton, metrics_url: str, http_url: str) -> None:
        """Triton, its metrics, and plain HTTP of the gateway."""
        self._triton = triton
        self._metrics_url, self._http_url = metrics_url, http_url
        self._probing = asyncio.Lock()
        self._health: Health | None = None
        self._asked = 0.0
        self.app = Starlette(routes=[Route("/metrics", self._metrics), Route("/health", self._told)])

    async def _metrics(self, _request: Request) -> Response:
        def read() -> bytes:
            with urlopen(self._metrics_url, 10, direct=True) as page:
                return page.read()

        try:
            page = await asyncio.to_thread(read) + self._triton.metrics().encode()
            return Response(page, media_type="text/plain; version=0.0.4")
        except OSError:
            return Response("the server is being started anew", status_code=503)

    async def _told(self, _request: Request) -> Response:
        async with self._probing:
            if self._health is None or time.monotonic() - self._asked > HEALTH_SECONDS:
                self._health = await asyncio.to_thread(probe, self._http_url, self._metrics_url, direct=True)
                self._asked = time.monotonic()
            health = self._health
        return JSONResponse(asdict(health), status_code=503 if health.state == "dead" else 200)
