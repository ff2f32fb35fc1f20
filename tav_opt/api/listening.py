"""The API as a process: it listens, works on the jobs, and ends where either does."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import replace

import uvicorn

from tav_opt.api.api_config import ApiConfig, checked
from tav_opt.api.application import application
from tav_opt.api.service import Service
from tav_opt.config import InputError

MAX_CONNECTIONS = 256
DRAIN_SECONDS = 10
"""How long what is being sent may take when the API is asked to stop."""


def run(config: ApiConfig) -> None:
    """Serves until a signal comes; raises InputError for what cannot be had."""
    config = checked(config)
    listener = _bound(config)
    try:
        asyncio.run(_serve(replace(config, port=listener.getsockname()[1]), listener))
    finally:
        listener.close()


async def _serve(config: ApiConfig, listener: socket.socket) -> None:
    service = Service.open(config)
    service.runner.recover()
    server = uvicorn.Server(
        uvicorn.Config(
            application(service),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            ssl_certfile=config.tls_certificate,
            ssl_keyfile=config.tls_key,
        )
    )
    working = asyncio.create_task(service.runner.run())
    serving = asyncio.create_task(server.serve([listener]))
    kind = "https" if config.tls_certificate else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"ready {kind}://{host}:{config.port}/v1", flush=True)
    try:
        await asyncio.wait((working, serving), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True  # where the work has ended, which it does by its faults alone
        await serving
    finally:
        ended = working.done()
        working.cancel()
        with suppress(asyncio.CancelledError):
            await (asyncio.wait([working]) if not ended else working)
        await service.close()


def _bound(config: ApiConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host.strip("[]"), config.port))
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        if isinstance(error, socket.gaierror):
            raise InputError(f"host {config.host!r} is not an address of this machine") from None
        told = f"port {config.port} on {config.host} cannot be taken: {error.strerror}; choose another, or 0"
        raise InputError(told) from None
    return listener
