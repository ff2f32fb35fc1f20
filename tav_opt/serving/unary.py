"""The unary model: one edit of the streaming model as one response. It needs neither torch nor an engine."""

from __future__ import annotations

import re
import threading
from typing import Any

from tav_opt.contract import STREAM_MODEL, UNARY_INPUTS, UNARY_OUTPUTS
from tav_opt.serving.caller import Caller, failure_of

POLL_SECONDS = 0.05
"""How often it is looked whether the client has gone."""

_OF_THE_QUEUE = re.compile(r"exceeds maximum queue size|request timeout expired", re.IGNORECASE)


def status_of(message: str) -> str:
    """Of Triton's own refusals: those of its queue are no fault of the request."""
    return "UNAVAILABLE" if _OF_THE_QUEUE.search(message) else "INTERNAL"


class TritonPythonModel:
    """The model as the Python backend drives it."""

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        self._pb: Any = pb_utils

    def execute(self, requests: list[Any]) -> None:
        """Passes requests on and returns, so that however many wait, they wait in the streaming model's queue."""
        for request in requests:
            threading.Thread(target=self._respond, args=(request, request.get_response_sender()), daemon=True).start()

    def _respond(self, request: Any, sender: Any) -> None:
        caller, answers = Caller(), []

        def call() -> None:
            try:
                answers.append(self._call(request, caller.name))
            except Exception as error:  # whatever a request does, it gets a response
                answers.append(self._failure("INTERNAL", f"{type(error).__name__}: {error}"))

        calling = threading.Thread(target=call, daemon=True)
        calling.start()
        while calling.is_alive():
            calling.join(POLL_SECONDS)
            # Asked by the thread that sends the response: afterwards Triton 2.51 would crash.
            if calling.is_alive() and sender.is_cancelled():
                caller.hang_up()
                calling.join()
        caller.hang_up()
        sender.send(answers[0], flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _call(self, request: Any, caller: str) -> Any:
        found = [self._pb.get_input_tensor_by_name(request, tensor.name) for tensor in UNARY_INPUTS]
        passed_on = self._pb.InferenceRequest(
            model_name=STREAM_MODEL,
            request_id=request.request_id(),
            inputs=[tensor for tensor in found if tensor is not None],
            requested_output_names=["stage", *(tensor.name for tensor in UNARY_OUTPUTS)],
            timeout=request.timeout(),
            parameters={"caller": caller},
        )
        last: dict[str, Any] = {}
        for response in passed_on.exec(decoupled=True):
            if response.has_error():
                text = response.error().message()
                return self._failure(status_of(text), text)
            last = {tensor.name(): tensor for tensor in response.output_tensors()} or last
        stage = last.pop("stage").as_numpy()[0].decode()
        if (failure := failure_of(stage)) is not None:
            return self._failure(*failure)
        return self._pb.InferenceResponse(list(last.values()))

    def _failure(self, status: str, message: str) -> Any:
        error = self._pb.TritonError(message, getattr(self._pb.TritonError, status))
        return self._pb.InferenceResponse(error=error)
