"""The unary model: one edit of the streaming model as one response. It needs neither torch nor an engine."""

from __future__ import annotations

import threading
from typing import Any

from tav_opt.contract import STREAM_MODEL, UNARY_INPUTS, UNARY_OUTPUTS


class TritonPythonModel:
    """The model as the Python backend drives it."""

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        self._pb: Any = pb_utils

    def execute(self, requests: list[Any]) -> None:
        """Passes each request on and returns; so that however many wait, they wait in the streaming model's queue."""
        for request in requests:
            threading.Thread(target=self._answer, args=(request, request.get_response_sender())).start()

    def _answer(self, request: Any, sender: Any) -> None:
        sender.send(self._last_response(request), flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _last_response(self, request: Any) -> Any:
        inputs = [self._pb.get_input_tensor_by_name(request, tensor.name) for tensor in UNARY_INPUTS]
        passed_on = self._pb.InferenceRequest(
            model_name=STREAM_MODEL,
            request_id=request.request_id(),
            inputs=[tensor for tensor in inputs if tensor is not None],
            requested_output_names=[tensor.name for tensor in UNARY_OUTPUTS],
            timeout=request.timeout(),
        )
        last = None
        for response in passed_on.exec(decoupled=True):
            if response.has_error():
                return self._pb.InferenceResponse(error=response.error())
            last = response if response.output_tensors() else last
        return self._pb.InferenceResponse(last.output_tensors())
