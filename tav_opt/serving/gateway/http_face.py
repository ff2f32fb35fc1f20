"""KServe v2 over HTTP: health, metadata, `infer`, and Triton's `generate` and `generate_stream`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from google.protobuf.json_format import MessageToDict
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Match, Route
from tritonclient.grpc import service_pb2

from tav_opt.config import InputError
from tav_opt.serving.gateway import json_tensors, openapi, rules
from tav_opt.serving.gateway.behind import Refusal, Trace, Triton, trace_of
from tav_opt.serving.gateway.grpc_face import in_our_words, refused

BODY_SECONDS = 60.0
"""Within which a request's body must have come."""
STATUS = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "PERMISSION_DENIED": 403,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
    "RESOURCE_EXHAUSTED": 429,
    "DEADLINE_EXCEEDED": 504,
    "UNIMPLEMENTED": 501,
}
"""Of HTTP for gRPC's; 500 for others."""

Handler = Callable[[Request], Awaitable[Response]]


class HttpFace:
    """The application; `app` is its ASGI callable."""

    def __init__(self, triton: Triton) -> None:
        self._triton = triton
        model = "/v2/models/{model}"
        routes = [
            Route("/v2/health/live", self._told(self._health("ServerLive", "live"))),
            Route("/v2/health/ready", self._told(self._health("ServerReady", "ready"))),
            Route("/v2", self._told(self._server)),
            Route("/openapi.json", _described),
            *(
                Route(f"{path}{end}", self._told(handler), methods=[method])
                for path in (model, f"{model}/versions/{{version}}")
                for end, handler, method in (
                    ("", self._model, "GET"),
                    ("/ready", self._model_ready, "GET"),
                    ("/infer", self._infer, "POST"),
                    ("/generate", self._generate, "POST"),
                    ("/generate_stream", self._generate_stream, "POST"),
                )
            ),
            Route("/v2/{rest:path}", self._told(self._restricted), methods=["GET", "POST"]),
        ]
        self.app = Starlette(routes=routes)

    def _told(self, handler: Handler) -> Handler:
        """A refusal becomes the answer's status and words."""

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except InputError as error:
                return _failed(self._triton.count(Refusal.of(error)))
            except Refusal as refusal:
                return _failed(self._triton.count(refusal))
            except ClientDisconnect:
                return Response(status_code=400)

        return answer

    def _health(self, method: str, field: str) -> Handler:
        kind = getattr(service_pb2, f"{method}Response")

        async def answer(_request: Request) -> Response:
            found = kind.FromString(await self._triton.ask(method, b""))
            return Response(status_code=200 if getattr(found, field) else 400)

        return answer

    async def _server(self, _request: Request) -> Response:
        found = service_pb2.ServerMetadataResponse.FromString(await self._triton.ask("ServerMetadata", b""))
        return JSONResponse({"name": found.name, "version": found.version, "extensions": list(found.extensions)})

    async def _model(self, request: Request) -> Response:
        name, version = _model(request)
        asked = service_pb2.ModelMetadataRequest(name=name, version=version).SerializeToString()
        found = service_pb2.ModelMetadataResponse.FromString(await self._triton.ask("ModelMetadata", asked))
        told = MessageToDict(found, preserving_proto_field_name=True)
        for kind, tensors in (("inputs", found.inputs), ("outputs", found.outputs)):
            told[kind] = [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in tensors]
        return JSONResponse(told)

    async def _model_ready(self, request: Request) -> Response:
        name, version = _model(request)
        asked = service_pb2.ModelReadyRequest(name=name, version=version).SerializeToString()
        found = service_pb2.ModelReadyResponse.FromString(await self._triton.ask("ModelReady", asked))
        return Response(status_code=200 if found.ready else 400)

    async def _infer(self, request: Request) -> Response:
        name, version = _model(request)
        length = request.headers.get(json_tensors.HEADER_LENGTH)
        body = await _body(request)
        message, binary = json_tensors.infer_request(name, version, body, length)
        content, headers = json_tensors.infer_response(await self._answered(request, message), binary)
        return Response(content, headers=headers)

    async def _generate(self, request: Request) -> Response:
        name, version = _model(request)
        message = json_tensors.generate_request(name, version, await _body(request))
        found = json_tensors.generated(await self._answered(request, message))
        return Response(json_tensors.compact(found), media_type="application/json")

    async def _restricted(self, request: Request) -> Response:
        """What no other route answers: a known path by a wrong method, or what administers a server."""
        if any(route.matches(request.scope)[0] is Match.PARTIAL for route in self.app.routes):
            told = {"error": f"{request.method} is not for {request.url.path[:63]}"}
            return JSONResponse(told, status_code=405, headers={"Allow": "POST" if request.method == "GET" else "GET"})
        path = request.path_params["rest"][:63]
        raise Refusal("PERMISSION_DENIED", f"{path!r} is restricted: nobody administers this server over the network")

    async def _answered(self, request: Request, message: rules.Message) -> bytes:
        """The answer; a client that hangs up cancels it."""
        asked = asyncio.ensure_future(
            self._triton.infer(rules.checked(message), trace=trace_of(request.headers.get("traceparent")))
        )
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((asked, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise Refusal("CANCELLED", "the client has left")
            return asked.result()
        finally:
            asked.cancel()
            leaving.cancel()

    async def _generate_stream(self, request: Request) -> Response:
        name, version = _model(request)
        message = json_tensors.generate_request(name, version, await _body(request))
        trace = trace_of(request.headers.get("traceparent"))
        return StreamingResponse(self._events(rules.checked(message), trace), media_type="text/event-stream")

    async def _events(self, message: rules.Message, trace: Trace) -> AsyncIterator[bytes]:
        try:
            async with aclosing(self._triton.stream(message, trace=trace)) as answers:
                async for answer in answers:
                    yield _event(in_our_words(answer, message.id))
        except Refusal as refusal:
            yield _event(refused(self._triton.count(refusal), message.id))


def _event(answer: bytes) -> bytes:
    reply = service_pb2.ModelStreamInferResponse.FromString(answer)
    found = json_tensors.generated(reply.infer_response.SerializeToString())
    return b"data: %b\n\n" % json_tensors.compact(found)


def _model(request: Request) -> tuple[str, str]:
    name, version = request.path_params["model"], request.path_params.get("version", "")
    rules.model(name, version)
    return name, version


async def _body(request: Request) -> bytes:
    """Raises InputError for a body that is too large, too slow, or not what it says."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > rules.MAX_REQUEST_BYTES:
                    raise InputError(f"the body has more than {rules.MAX_REQUEST_BYTES} bytes")
                parts.append(part)
    except TimeoutError:
        raise InputError(f"the body did not come within {BODY_SECONDS:g} s") from None
    encoding = request.headers.get("content-encoding", "").strip().lower()
    return json_tensors.unpacked(b"".join(parts), encoding)


async def _left(request: Request) -> None:
    """Returns when the client has hung up."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def _described(_request: Request) -> Response:
    return JSONResponse(openapi.document())


def _failed(refusal: Refusal) -> Response:
    return JSONResponse({"error": refusal.message}, status_code=STATUS.get(refusal.status, 500))
