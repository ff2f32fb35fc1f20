"""`python -m tav_opt.serving.gateway`: the gateway as a process of its own; the host starts it, and it ends with it.

Its settings come as a line of JSON on standard input, which the host keeps open for as long as it lives.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

import grpc
import uvicorn

from tav_opt.serving.gateway.behind import Triton
from tav_opt.serving.gateway.grpc_face import GrpcFace
from tav_opt.serving.gateway.http_face import HttpFace
from tav_opt.serving.gateway.impatient import Impatient
from tav_opt.serving.gateway.pages import Pages
from tav_opt.serving.gateway.quiet import Quiet
from tav_opt.serving.gateway.rules import MAX_REQUEST_BYTES
from tav_opt.serving.gateway.settings import DRAIN_SECONDS, KEEPALIVE_SECONDS, Settings

MAX_CALLS = 1000
"""At a time; the next ones wait."""
MAX_CONNECTIONS = 1000
_GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: gRPC unpacks without an end what was packed
    ("grpc.so_reuseport", 0),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_SECONDS * 500),
    ("grpc.max_metadata_size", 16 << 10),
)


async def run(settings: Settings) -> None:
    """Serves until a signal comes, or the host has gone; then what is in flight may end."""
    triton = Triton(settings.triton_port, settings.key, settings.log_format)
    listener = grpc.aio.server(options=_GRPC_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
    listener.add_generic_rpc_handlers((GrpcFace(triton),))
    _listen(listener, settings)
    await listener.start()
    here = "http://127.0.0.1"
    pages = Pages(triton, f"{here}:{settings.triton_metrics_port}/metrics", f"{here}:{settings.inner_port}")
    face = HttpFace(triton).app
    listeners = [
        _page(face, settings.host, settings.http_port, _secured(settings)),
        _page(face, "127.0.0.1", settings.inner_port, {}),
        _page(pages.app, settings.host, settings.metrics_port, {}),
    ]
    serving = [asyncio.create_task(page.serve()) for page in listeners]
    await _asked_to_stop()
    for page in listeners:
        page.should_exit = True
    await asyncio.gather(listener.stop(DRAIN_SECONDS), *serving)
    await triton.close()


def _listen(listener: Any, settings: Settings) -> None:
    address = f"{settings.host}:{settings.grpc_port}"
    if settings.tls_certificate is None or settings.tls_key is None:
        listener.add_insecure_port(address)
        return
    pair = (Path(settings.tls_key).read_bytes(), Path(settings.tls_certificate).read_bytes())
    ca = Path(settings.tls_client_ca).read_bytes() if settings.tls_client_ca else None
    listener.add_secure_port(address, grpc.ssl_server_credentials([pair], ca, ca is not None))


def _secured(settings: Settings) -> dict[str, Any]:
    if settings.tls_certificate is None:
        return {}
    pair = {"ssl_certfile": settings.tls_certificate, "ssl_keyfile": settings.tls_key}
    if settings.tls_client_ca is None:
        return pair
    return pair | {"ssl_ca_certs": settings.tls_client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}


def _page(app: Any, host: str, port: int, secured: dict[str, Any]) -> Quiet:
    return Quiet(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=Impatient,
            log_level="error",
            access_log=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=KEEPALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            server_header=False,
            **secured,
        )
    )


async def _asked_to_stop() -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    loop.add_reader(sys.stdin, asked.set)  # nothing more is written there: it ends with the host
    await asked.wait()
    loop.remove_reader(sys.stdin)


if __name__ == "__main__":
    given = json.loads(sys.stdin.readline())
    asyncio.run(run(Settings(**given)))
    os._exit(0)  # no thread of gRPC's shall keep it
