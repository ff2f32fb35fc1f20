"""The gRPC client of the served model, for threads and for asyncio: no torch, only grpcio, tritonclient and numpy."""

from __future__ import annotations

from tav_opt.client.aio import AsyncClient, AsyncStream
from tav_opt.client.channel import Tls
from tav_opt.client.exchange import Edit, Options, Progress, Retry, ServerError
from tav_opt.client.sync import Client, Stream
from tav_opt.config import OnProgress

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Edit",
    "OnProgress",
    "Options",
    "Progress",
    "Retry",
    "ServerError",
    "Stream",
    "Tls",
]
