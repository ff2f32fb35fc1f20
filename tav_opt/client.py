"""The gRPC client of the served model: no torch, only tritonclient and numpy."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tav_opt.config import EditConfig, InputError
from tav_opt.contract import STREAM_MODEL, status_of_refusal, to_tensors

OnProgress = Callable[[str, int, int], Any]
"""Called with the stage, the steps done and the steps of the stage."""


class ServerError(RuntimeError):
    """The server could not answer, through no fault of the request; `status` is the gRPC status, e.g. UNAVAILABLE."""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(f"{message} ({status})")
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What the server made of a clip."""

    frames: np.ndarray
    """uint8 (prompts, f, H, W, 3) RGB."""
    fps: float


class Client:
    """A connection to a server; one edit at a time.

    with Client("localhost:8001") as client:
        edit = client.edit("man-skiing", ["a panda is skiing"])
    """

    def __init__(self, url: str = "localhost:8001") -> None:
        if "://" in url or not url.rpartition(":")[2].isdigit():
            raise InputError(f"url {url!r} is not host:port, e.g. localhost:8001")
        self.url = url
        self._triton = triton.InferenceServerClient(url)

    def edit(self, clip: str, edit: EditConfig | Sequence[str], *, on_progress: OnProgress | None = None) -> Edit:
        """Edits an exported clip; prompts alone stand for EditConfig(prompts=…).

        Raises InputError for an unknown clip, settings the server refuses, and a server that cannot be reached;
        ServerError for its failures. Ctrl-C, an exception in `on_progress` and `close` cancel the edit on the server.
        """
        config = edit if isinstance(edit, EditConfig) else EditConfig(prompts=tuple(edit))
        inputs = [_input(name, array) for name, array in to_tensors(clip, config).items()]
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._triton.start_stream(lambda result, error: answers.put((result, error)))
        ended = False
        try:
            with suppress(InferenceServerException):  # a stream that broke meanwhile: its callback tells why
                self._triton.async_stream_infer(STREAM_MODEL, inputs)
            while True:
                result, error = answers.get()
                ended = error is not None or result.get_response().parameters["triton_final_response"].bool_param
                if error is not None:
                    raise self._error(error)
                if (failure := result.as_numpy("error")) is not None:
                    raise _failure(*(text.decode() for text in failure))
                if ended:
                    return Edit(frames=result.as_numpy("frames"), fps=float(result.as_numpy("fps")[0]))
                if on_progress is not None:
                    on_progress(*_progress(result))
        finally:
            self._triton.stop_stream(cancel_requests=not ended)

    def close(self) -> None:
        """Cancels an edit in flight and closes the connection."""
        self._triton.stop_stream(cancel_requests=True)
        self._triton.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _error(self, error: InferenceServerException) -> Exception:
        status = str(error.status() or status_of_refusal(error.message())).removeprefix("StatusCode.")
        if status == "UNAVAILABLE" and not self._is_live():
            return InputError(f"no server answers at {self.url}: is it running? (tav-opt serve)")
        return _failure(status, error.message())

    def _is_live(self) -> bool:
        try:
            return bool(self._triton.is_server_live(client_timeout=5))
        except InferenceServerException:
            return False


def _failure(status: str, message: str) -> Exception:
    if status in ("INVALID_ARGUMENT", "NOT_FOUND"):
        return InputError(message)
    return ServerError(message, status)


def _input(name: str, array: np.ndarray) -> Any:
    tensor = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return tensor.set_data_from_numpy(array)


def _progress(result: Any) -> tuple[str, int, int]:
    return result.as_numpy("stage")[0].decode(), int(result.as_numpy("step")[0]), int(result.as_numpy("steps")[0])
