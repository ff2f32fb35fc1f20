"""KServe v2 over gRPC: inference.GRPCInferenceService as Triton has it, less what administers a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from tav_opt.config import InputError
from tav_opt.contract import status_of_refusal
from tav_opt.serving.gateway import rules
from tav_opt.serving.gateway.behind import Refusal, Trace, Triton, trace_of

SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
STATUS_ON_STREAM = "triton_grpc_error"
"""A client's header: errors end a stream with their gRPC status. Triton 2.51 dies of it, and never sees it."""
LONGEST_FAILURE = 16 << 10
"""Bytes of a response that tells of one; frames are longer, and not looked into."""
OF_MODELS = ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics")
OF_THE_SERVER = ("ServerLive", "ServerReady", "ServerMetadata")


class GrpcFace(grpc.GenericRpcHandler):
    """Answers every method of the service; messages stay bytes where nobody has to look inside."""

    def __init__(self, triton: Triton) -> None:
        self._triton = triton

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a method; None for one that the service does not have."""
        _, service, method = (*details.method.split("/"), "", "")[:3]
        if service != SERVICE.full_name or method not in SERVICE.methods_by_name:
            return None
        if method == "ModelStreamInfer":
            return grpc.stream_stream_rpc_method_handler(self._stream)
        if method == "ModelInfer":
            return grpc.unary_unary_rpc_method_handler(self._told(self._infer))
        if method in OF_THE_SERVER:
            return grpc.unary_unary_rpc_method_handler(self._told(self._passed(method)))
        if method in OF_MODELS:
            return grpc.unary_unary_rpc_method_handler(self._told(self._about_model(method)))
        return grpc.unary_unary_rpc_method_handler(self._told(_restricted(method)))

    def _told(self, answer: Answer) -> Answer:
        """A refusal becomes the call's status."""

        async def handler(data: bytes, context: Any) -> bytes:
            try:
                return await answer(data, context)
            except Refusal as refusal:
                self._triton.count(refusal)
                return await context.abort(grpc.StatusCode[refusal.status], refusal.message)

        return handler

    async def _infer(self, data: bytes, context: Any) -> bytes:
        return await self._triton.infer(checked(_read(data)), context.time_remaining(), _trace(context))

    def _passed(self, method: str) -> Answer:
        async def answer(_data: bytes, _context: Any) -> bytes:
            return await self._triton.ask(method, b"")

        return answer

    def _about_model(self, method: str) -> Answer:
        kind = getattr(service_pb2, f"{method}Request")

        async def answer(data: bytes, _context: Any) -> bytes:
            asked = _parsed(kind, data)
            if asked.name or method != "ModelStatistics":  # without a name: of all models
                _known(asked.name, asked.version)
            return await self._triton.ask(method, kind(name=asked.name, version=asked.version).SerializeToString())

        return answer

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Each request has its answers; they come as they are made, and one that is refused ends no other."""
        with_status = (STATUS_ON_STREAM, "true") in (context.invocation_metadata() or ())
        answers: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=2)  # a slow reader slows what is read for it
        reading = asyncio.create_task(self._read(requests, answers, context))
        try:
            while (answer := await answers.get()) is not None:
                if with_status and (refusal := failure(answer)) is not None:
                    await context.abort(grpc.StatusCode[refusal.status], refusal.message)
                yield answer
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[bytes], answers: asyncio.Queue[bytes | None], context: Any) -> None:
        """Puts the answers of all requests of a stream, and None behind the last."""
        async with asyncio.TaskGroup() as answering:
            async for data in requests:
                answering.create_task(self._answer(data, answers, context))
        await answers.put(None)

    async def _answer(self, data: bytes, answers: asyncio.Queue[bytes | None], context: Any) -> None:
        request_id = ""
        try:
            message = _read(data)
            request_id = message.id
            message = checked(message)
            async with aclosing(self._triton.stream(message, context.time_remaining(), _trace(context))) as found:
                async for answer in found:
                    await answers.put(in_our_words(answer, request_id))
        except Refusal as refusal:
            await answers.put(refused(self._triton.count(refusal), request_id))


Answer = Callable[[bytes, Any], Awaitable[bytes]]


def _trace(context: Any) -> Trace:
    return trace_of(dict(context.invocation_metadata() or ()).get("traceparent"))


def _read(data: bytes) -> rules.Message:
    try:
        return rules.parsed(data)
    except InputError as error:
        raise Refusal.of(error) from None


def checked(message: rules.Message) -> rules.Message:
    """Raises Refusal."""
    try:
        return rules.checked(message)
    except InputError as error:
        raise Refusal.of(error) from None


def _known(name: str, version: str) -> None:
    try:
        rules.model(name, version)
    except InputError as error:
        raise Refusal.of(error) from None


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except Exception:  # protobuf's own, of more than one class
        raise Refusal("INVALID_ARGUMENT", f"the message is no {kind.DESCRIPTOR.name}") from None


def _restricted(method: str) -> Answer:
    async def answer(_data: bytes, _context: Any) -> bytes:
        raise Refusal("PERMISSION_DENIED", f"{method} is restricted: nobody administers this server over the network")

    return answer


def refused(refusal: Refusal, request_id: str) -> bytes:
    """As the worker refuses: a last response with the tensor `error`."""
    response = service_pb2.ModelInferResponse(id=request_id)
    response.parameters["triton_final_response"].bool_param = True
    told = {"error": [refusal.status, refusal.message], "request_id": [request_id]}
    for name, texts in told.items():
        response.outputs.add(name=name, datatype="BYTES", shape=[len(texts)])
        response.raw_output_contents.append(rules.pack("BYTES", [text.encode() for text in texts], name))
    return service_pb2.ModelStreamInferResponse(infer_response=response).SerializeToString()


def in_our_words(answer: bytes, request_id: str) -> bytes:
    """A stream's response itself; Triton's own refusals become those of the worker."""
    if len(answer) > LONGEST_FAILURE:
        return answer
    told = service_pb2.ModelStreamInferResponse.FromString(answer).error_message
    return refused(Refusal(status_of_refusal(told), told), request_id) if told else answer


def failure(answer: bytes) -> Refusal | None:
    """What a stream's response says of a failure, be it Triton's own or the worker's; None where it says none."""
    if len(answer) > LONGEST_FAILURE:
        return None
    reply = service_pb2.ModelStreamInferResponse.FromString(answer)
    if reply.error_message:
        return Refusal(status_of_refusal(reply.error_message), reply.error_message)
    for output, data in zip(reply.infer_response.outputs, reply.infer_response.raw_output_contents, strict=True):
        if output.name == "error":
            return Refusal(*(text.decode() for text in rules.unpack_texts("error", 2, data)))
    return None
