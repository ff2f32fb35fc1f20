"""The unary model: one edit of the streaming model as one response. It needs neither torch nor an engine."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from tav_opt.config import InputError
from tav_opt.contract import STREAM_MODEL, UNARY_INPUTS, UNARY_OUTPUTS, status_of_refusal
from tav_opt.repository.layout import version_folder
from tav_opt.repository.model_files import read_parameters
from tav_opt.serving import envelope, tracing
from tav_opt.serving.caller import Caller
from tav_opt.serving.responses import Response, Responses, key

POLL_SECONDS = 0.05
"""How often it is looked whether the client has gone."""

MAX_BYTES = 1 << 30
"""Of frames in one response; Protocol Buffers end at twice that."""
CODES = {"INVALID_ARGUMENT": "INVALID_ARG"}
"""Statuses that Triton's Python backend calls otherwise than gRPC."""


class Refused(Exception):
    """The edit failed: with a gRPC status, and a message."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Frames (prompts, f, H, W, 3) of a result that came in parts; raises Refused for more than a response holds."""
    if (size := sum(part.nbytes for part in parts)) > MAX_BYTES:
        raise Refused("INVALID_ARGUMENT", f"the result has {size} bytes, one response {MAX_BYTES}: ask {STREAM_MODEL}")
    return np.concatenate(parts, axis=1)


class TritonPythonModel:
    """The model as the Python backend drives it."""

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        self._pb: Any = pb_utils
        config = read_parameters(json.loads(args["model_config"]))
        self._version = version_folder(Path(args["model_repository"]).parent)
        self._traced = tracing.VARIABLE in os.environ
        self._responses = Responses(config.responses_mib << 20)
        self._family = pb_utils.MetricFamily(
            name="tav_opt_responses_total",
            description="Unary responses by where they came from",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._counts = {name: self._family.Metric(labels={"from": name}) for name in ("cache", "worker")}

    def execute(self, requests: list[Any]) -> None:
        """Answers requests one after the other; the next ones wait in this model's queue.

        Never several calls at once: those that the streaming model's full queue refuses together crash Triton 2.51.
        """
        for request in requests:
            self._respond(request, request.get_response_sender())

    def _respond(self, request: Any, sender: Any) -> None:
        caller, request_id, answers = Caller(), envelope.request_id(request), []

        def answer() -> None:
            try:
                response = self._answer(request, request_id, caller.name)
                response = {**response, "request_id": np.array([request_id.encode()], np.object_)}
                answers.append(self._response(envelope.asked_for(request, response)))
            except Exception as error:  # whatever a request does, it gets a response
                answers.append(self._failure(error, request_id))

        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        while answering.is_alive():
            answering.join(POLL_SECONDS)
            # Asked by the thread that sends the response: afterwards Triton 2.51 would crash.
            if answering.is_alive() and sender.is_cancelled():
                caller.hang_up()
                answering.join()
        caller.hang_up()
        sender.send(answers[0], flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any, request_id: str, caller: str) -> Response:
        read = envelope.read(request, (tensor.name for tensor in UNARY_INPUTS))
        found = [self._pb.get_input_tensor_by_name(request, tensor.name) for tensor in UNARY_INPUTS]
        inputs = [tensor for tensor in found if tensor is not None]
        name = key({tensor.name(): tensor.as_numpy() for tensor in inputs}, self._version)
        kept = self._responses.get(name)
        self._counts["worker" if kept is None else "cache"].increment(1)
        if kept is not None:
            self._pb.Logger.log_info(f"request {request_id!r}: OK from the cache")
            return kept
        response = self._call(request, inputs, request_id, read.timeout_us, caller)
        self._responses.put(name, response)
        return response

    def _call(self, request: Any, inputs: list[Any], request_id: str, timeout_us: int, caller: str) -> Response:
        """The last response of the streaming model; raises Refused."""
        passed_on = self._pb.InferenceRequest(
            model_name=STREAM_MODEL,
            request_id=request_id,
            inputs=inputs,
            requested_output_names=["error", *(tensor.name for tensor in UNARY_OUTPUTS)],
            timeout=timeout_us,
            parameters={envelope.CALLER: caller},
            **({"trace": request.trace()} if self._traced else {}),
        )
        last: Response = {}
        parts: list[np.ndarray] = []
        # Kept until the next one: else the last to let go of it is a thread of Triton 2.51 that has not Python's lock,
        # and frees its tensors all the same, of which Python 3.12 dies.
        self._streamed = passed_on.exec(decoupled=True)
        for response in self._streamed:
            if response.has_error():
                message = response.error().message()
                raise Refused(status_of_refusal(message), message)
            found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            if "frames" in found and "metadata" not in found:
                parts.append(np.array(found["frames"]))  # it lies in memory that Triton takes back
            last = found or last
        if "error" in last:
            raise Refused(*(text.decode() for text in last["error"]))
        return {**last, "frames": _joined(parts)} if parts else last

    def _response(self, tensors: Response) -> Any:
        return self._pb.InferenceResponse([self._pb.Tensor(name, array) for name, array in tensors.items()])

    def _failure(self, error: Exception, request_id: str) -> Any:
        """An error response; one that only the log explains names the request to look for."""
        match error:
            case Refused(status=status):
                pass
            case InputError():
                status = "INVALID_ARGUMENT"
            case _:
                status = "INTERNAL"
        told = f"{error} (request {request_id!r})" if status == "INTERNAL" else str(error)
        code = getattr(self._pb.TritonError, CODES.get(status, status))
        return self._pb.InferenceResponse(error=self._pb.TritonError(told, code))
