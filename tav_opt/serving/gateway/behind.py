"""Triton, which listens to nobody but the gateway: the way to it, and what of a request is known on the way."""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import grpc

from tav_opt.config import InputError
from tav_opt.contract import STARTED_ANEW
from tav_opt.serving import log
from tav_opt.serving.gateway.rules import Message, NotFound
from tav_opt.serving.gateway.settings import HEADER

PREFIX = "triton-grpc-protocol-"
"""Of the header that Triton asks for where a protocol is restricted."""
_PATH = "/inference.GRPCInferenceService"
IN_FLIGHT_BYTES = 1 << 30
"""Of all requests together that are being answered."""
DEATHS = 2
"""After so many within SUSPECT_SECONDS a request that was in flight at each is refused."""
SUSPECT_SECONDS = 600.0
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)


Trace = tuple[tuple[str, str], ...]
"""Headers of W3C's trace context, as they go on to Triton, whose spans then stand below the client's."""
_TRACE = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def trace_of(traceparent: str | bytes | None) -> Trace:
    """Of what a client sent by the name `traceparent`; nothing where that is no such header."""
    return (("traceparent", traceparent),) if isinstance(traceparent, str) and _TRACE.fullmatch(traceparent) else ()


class Refusal(Exception):
    """What a client is told in an answer's place."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message

    @classmethod
    def of(cls, error: InputError) -> Refusal:
        """Of a request that is to blame."""
        return cls("NOT_FOUND" if isinstance(error, NotFound) else "INVALID_ARGUMENT", str(error))


class Died(Refusal):
    """The server was lost while it had the request."""


class Triton:
    """The server behind the gateway, as the running event loop reaches it."""

    def __init__(self, port: int, key: str, log_format: log.LogFormat = "text") -> None:
        self._log_format = log_format
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", _OPTIONS)
        self._metadata = ((PREFIX + HEADER, key),)
        self._bytes = 0
        self._died = 0
        self._deaths: dict[str, list[float]] = {}
        """When, over each request."""
        self._refused: Counter[str] = Counter()

    async def ask(self, method: str, message: bytes, timeout_s: float | None = 5.0, trace: Trace = ()) -> bytes:
        """One answer of one of the service's methods; raises Refusal."""
        call = self._channel.unary_unary(f"{_PATH}/{method}")
        try:
            return await call(message, metadata=(*self._metadata, *trace), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise _refusal(error) from None

    async def infer(self, message: Message, timeout_s: float | None = None, trace: Trace = ()) -> bytes:
        """A checked request → its ModelInferResponse; raises Refusal."""
        data = message.SerializeToString()
        with self._in_flight(message, data):
            return await self.ask("ModelInfer", data, timeout_s, trace)

    async def stream(
        self, message: Message, timeout_s: float | None = None, trace: Trace = ()
    ) -> AsyncGenerator[bytes, None]:
        """A checked request → its ModelStreamInferResponses; raises Refusal. Leaving it cancels the request."""
        data = message.SerializeToString()
        with self._in_flight(message, data):
            call = self._channel.stream_stream(f"{_PATH}/ModelStreamInfer")(
                iter([data]), metadata=(*self._metadata, *trace), timeout=timeout_s
            )
            try:
                async for answer in call:
                    yield answer
            except grpc.aio.AioRpcError as error:
                raise _refusal(error) from None
            finally:
                call.cancel()

    @contextmanager
    def _in_flight(self, message: Message, data: bytes) -> Iterator[None]:
        """Counts its bytes, and notes it where the server dies over it."""
        if self._bytes + len(data) > IN_FLIGHT_BYTES:
            raise Refusal("UNAVAILABLE", "the requests in flight fill the memory meant for them: try again later")
        name = _content(message)
        self._check_suspect(name)
        self._bytes += len(data)
        try:
            yield
        except Died:
            self._note_death(name, message.id)
            raise
        finally:
            self._bytes -= len(data)

    def _check_suspect(self, name: str) -> None:
        now = time.monotonic()
        recent = {one: [at for at in deaths if now - at < SUSPECT_SECONDS] for one, deaths in self._deaths.items()}
        self._deaths = {one: deaths for one, deaths in recent.items() if deaths}
        if (count := len(self._deaths.get(name, ()))) >= DEATHS:
            told = f"the server died {count} times within ten minutes while it had this request: try again after them"
            raise Refusal("INVALID_ARGUMENT", told)

    def _note_death(self, name: str, request_id: str) -> None:
        self._died += 1
        deaths = self._deaths.setdefault(name, [])
        deaths.append(time.monotonic())
        if len(deaths) == DEATHS:
            told = f"the server died {DEATHS} times while it had request {request_id!r}, which is refused for now"
            log.tell(told, self._log_format)

    def count(self, refusal: Refusal) -> Refusal:
        """The refusal itself, which the metrics then know of."""
        self._refused[refusal.status] += 1
        return refusal

    def metrics(self) -> str:
        """What the gateway adds to Triton's page."""
        lines = [f'tav_opt_gateway_refused_total{{status="{name}"}} {n}' for name, n in sorted(self._refused.items())]
        lines += [f"tav_opt_gateway_deaths_total {self._died}", f"tav_opt_gateway_bytes {self._bytes}"]
        return "\n".join([*lines, ""])

    async def close(self) -> None:
        await self._channel.close()


_LOST = re.compile("Socket closed|Connection reset|GOAWAY|Broken pipe|stream removed", re.IGNORECASE)


def _refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """In our words where nobody answers; else in Triton's, with the status that its words have."""
    status, details = error.code().name, error.details() or ""
    if status != "UNAVAILABLE":
        return Refusal(status, details)
    if _LOST.search(details):
        return Died(status, f"the server died while it had the request, and is {STARTED_ANEW}")
    if "connect" in details:
        return Refusal(status, f"the server is being {STARTED_ANEW}: try again in some seconds")
    return Refusal(status, details)


def _content(message: Message) -> str:
    """The same for the same request, whatever its id."""
    digest = hashlib.sha256(message.model_name.encode())
    for tensor, data in zip(message.inputs, message.raw_input_contents, strict=True):
        digest.update(f"{tensor.name} {list(tensor.shape)} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()
