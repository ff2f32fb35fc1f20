"""A server of the exported clips, and requests as raw as the protocol allows."""

from __future__ import annotations

import json
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype

from tav_opt.client import channel
from tav_opt.config import InputError, WorkerConfig
from tav_opt.contract import STREAM_MODEL, status_of_refusal
from tav_opt.serving.host import tritonserver
from tav_opt.serving.host.serve_config import ServeConfig
from tav_opt.serving.host.server import Server

STATUS_SECONDS = 60
"""By then every request has an answer."""


@contextmanager
def serving(repository: Path, config: WorkerConfig) -> Iterator[Server]:
    """A server on free ports; skips where the machine has none."""
    try:
        tritonserver.find_tritonserver()
    except InputError as lacking:
        pytest.skip(str(lacking))
    with Server(ServeConfig(repository=repository, grpc_port=0, http_port=0, metrics_port=0, worker=config)) as server:
        yield server


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for something to become true: the server's log comes by a pipe, behind its answers."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def processes(server: Server) -> set[int]:
    """Of the models: another set after a crash."""
    return {child.pid for child in psutil.Process(server.process.pid).children(recursive=True)}


@dataclass(frozen=True)
class Raw:
    """An input as it goes over the wire, whether or not it makes sense."""

    datatype: str
    shape: tuple[int, ...]
    content: bytes


@dataclass
class Answer:
    """What came back: the gRPC status, its message, and the responses."""

    status: str
    message: str = ""
    responses: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def last(self) -> dict[str, np.ndarray]:
        return next(response for response in reversed(self.responses) if response)


def raw(tensors: Mapping[str, np.ndarray]) -> dict[str, Raw]:
    return {name: Raw(np_to_triton_dtype(a.dtype), a.shape, content(a)) for name, a in tensors.items()}


def content(array: np.ndarray) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(struct.pack("<I", len(item)) + item for item in array.ravel())


def request(
    model: str, inputs: Mapping[str, Raw], parameters: Mapping[str, int | str] | None = None
) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, given in inputs.items():
        message.inputs.add(name=name, datatype=given.datatype, shape=given.shape)
        message.raw_input_contents.append(given.content)
    for name, value in (parameters or {}).items():
        setattr(message.parameters[name], "int64_param" if isinstance(value, int) else "string_param", value)
    return message


class Wire:
    """A gRPC connection that sends anything."""

    def __init__(self, url: str) -> None:
        self.channel = grpc.insecure_channel(url, options=channel.OPTIONS + channel.DIRECT)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def ask(
        self,
        inputs: Mapping[str, Raw],
        *,
        parameters: Mapping[str, Any] | None = None,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> Answer:
        """On a stream."""
        call = self.stub.ModelStreamInfer(
            iter([request(STREAM_MODEL, inputs, parameters)]), metadata=metadata, timeout=STATUS_SECONDS
        )
        answer = Answer("OK")
        try:
            for reply in call:
                if reply.error_message:
                    return Answer(status_of_refusal(reply.error_message), reply.error_message, answer.responses)
                answer.responses.append(_arrays(reply.infer_response))
                if "error" in answer.responses[-1]:
                    return Answer(*(text.decode() for text in answer.responses.pop()["error"]), answer.responses)
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details(), answer.responses)
        return answer

    def infer(self, model: str, inputs: Mapping[str, Raw], *, parameters: Mapping[str, Any] | None = None) -> Answer:
        """One response."""
        try:
            reply = self.stub.ModelInfer(request(model, inputs, parameters), timeout=STATUS_SECONDS)
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details())
        return Answer("OK", "", [_arrays(reply)])

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()


_NUMPY = {"FP32": np.float32, "INT32": np.int32, "UINT8": np.uint8}


def _arrays(reply: service_pb2.ModelInferResponse) -> dict[str, np.ndarray]:
    found = {}
    for output, data in zip(reply.outputs, reply.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            found[output.name] = np.array(_strings(data), np.object_)
        else:
            found[output.name] = np.frombuffer(data, _NUMPY[output.datatype]).reshape(output.shape)
    return found


def _strings(data: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def post(server: Server, model: str, tensors: Mapping[str, np.ndarray]) -> tuple[int, Any]:
    """Over HTTP, in JSON: status and body."""
    inputs = [
        {"name": name, "datatype": np_to_triton_dtype(a.dtype), "shape": a.shape, "data": [_json(v) for v in a.ravel()]}
        for name, a in tensors.items()
    ]
    body = json.dumps({"inputs": inputs}).encode()
    try:
        with urllib.request.urlopen(f"{server.http_url}/v2/models/{model}/infer", body, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def _json(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value.item()


def metrics(server: Server) -> dict[str, float]:
    """By name and labels, as Prometheus reads them."""
    with urllib.request.urlopen(server.metrics_url, timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line and line[0] != "#"}
