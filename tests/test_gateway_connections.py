"""Connections that ask for nothing do not keep others out of the gateway."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from served import until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from tav_opt.serving.gateway.impatient import Impatient

GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"


class Hasty(Impatient):
    LOOK_SECONDS = 0.25


async def slow(_request: Request) -> Response:
    await asyncio.sleep(5 * Hasty.LOOK_SECONDS)
    return PlainTextResponse("late")


async def quick(_request: Request) -> Response:
    return PlainTextResponse("soon")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server with two places."""
    app = Starlette(routes=[Route("/slow", slow), Route("/quick", quick)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=Hasty, limit_concurrency=3, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def said(connection: socket.socket, end: bytes = b"") -> bytes:
    """All that comes until `end`, or the connection is closed."""
    found = b""
    while not (end and found.endswith(end)) and (part := connection.recv(1 << 16)):
        found += part
    return found


@pytest.mark.parametrize("begun", [b"", b"GET /quick HT", b"GET /quick HTTP/1.1\r\nHost: x\r\nX: "])
def test_whoever_asks_for_nothing_is_closed(port, begun):
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(begun)
        assert said(connection) == b""


def test_so_is_whoever_asks_no_more(port):
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        for _ in range(2):
            connection.sendall(GET % b"quick")
            assert said(connection, b"soon").startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /quick HT")
        assert said(connection) == b""


def test_whoever_waits_for_an_answer_is_not(port):
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.sendall(GET % b"slow")
        assert said(connection, b"late").startswith(b"HTTP/1.1 200")


def test_idle_connections_give_their_places_back(port):
    idle = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(5)]

    def status() -> bytes:
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            connection.sendall(GET % b"quick")
            return connection.recv(1 << 16)[9:12]

    assert status() == b"503"
    until(lambda: status() == b"200")
    for connection in idle:
        connection.close()
