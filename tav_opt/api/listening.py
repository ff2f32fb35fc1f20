"""The API as a process: it listens, works on the jobs, and ends where either does."""

from __future__ import annotations

import asyncio
import signal
import socket
from dataclasses import replace

import uvicorn

from tav_opt.api.api_config import ApiConfig, checked
from tav_opt.api.application import application
from tav_opt.api.service import Service
from tav_opt.command import Interrupted
from tav_opt.config import InputError
from tav_opt.serving.gateway.impatient import Impatient
from tav_opt.serving.gateway.quiet import Quiet

MAX_CONNECTIONS = 256
DRAIN_SECONDS = 10
"""How long what is being sent may take when the API is asked to stop."""


def run(config: ApiConfig) -> None:
    """Serves until a signal comes; raises InputError for what cannot be had, and Interrupted for the signal."""
    config = checked(config)
    listener = _bound(config)
    try:
        number = asyncio.run(_serve(replace(config, port=listener.getsockname()[1]), listener))
    finally:
        listener.close()
    raise Interrupted(number, "stopped; what was in work is begun anew by the next one")


async def _serve(config: ApiConfig, listener: socket.socket) -> int:
    """The number of the signal that ended it."""
    service = Service.open(config)
    service.runner.recover()
    server = Quiet(_uvicorn(config, service))
    signals = _signals()
    working = asyncio.create_task(service.runner.run())
    serving = asyncio.create_task(server.serve([listener]))
    asked = asyncio.create_task(signals.get())
    print(f"ready {_address(config)}/v1", flush=True)
    try:
        await asyncio.wait((working, serving, asked), return_when=asyncio.FIRST_COMPLETED)
        service.stopping = server.should_exit = True  # work and listening have no end, but for their faults
        service.runner.wake()
        await serving
        if not asked.done():
            await working
        return await asked
    finally:
        working.cancel()
        await asyncio.wait([working])
        await service.close()


def _uvicorn(config: ApiConfig, service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        application(service),
        http=Impatient,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
    )


def _signals() -> asyncio.Queue[int]:
    """Those that ask for the end, from here on."""
    found: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, found.put_nowait, number)
    return found


def _address(config: ApiConfig) -> str:
    host = f"[{config.host.strip('[]')}]" if ":" in config.host else config.host
    return f"{'https' if config.tls_certificate else 'http'}://{host}:{config.port}"


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
