"""What runs inside Triton Inference Server's Python backend: one edit at a time, told of step by step.

Nothing here needs Triton but `TritonPythonModel`, the thin face of it at the end.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tav_opt import editing
from tav_opt.config import InputError
from tav_opt.contract import CLIP_NAME, STREAM_INPUTS, ClipInfo, check_clip_name, from_tensors
from tav_opt.ddim import Stopped
from tav_opt.engines import Engine, onnxruntime
from tav_opt.files import read_json

Status = Literal["INVALID_ARG", "NOT_FOUND", "CANCELLED", "INTERNAL"]
Send = Callable[[dict[str, np.ndarray]], None]


class UnknownClip(InputError):
    """No clip of that name is exported."""


class Clips:
    """The exported clips of a version folder, found when asked for and kept open; one base serves all of its clips."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bases: dict[str, onnxruntime.OnnxBase] = {}
        self._open: dict[str, tuple[int, Engine]] = {}

    def names(self) -> list[str]:
        """Of all clips that are there now."""
        found = (path.parent.name for path in self._folder.glob("clips/*/manifest.json"))
        return sorted(name for name in found if CLIP_NAME.match(name))

    def get(self, name: str) -> Engine:
        """The engine of a clip, opened anew where it was exported anew.

        Raises UnknownClip, and RuntimeError for an exported clip that is damaged.
        """
        try:
            manifest = self._folder / "clips" / check_clip_name(name) / "manifest.json"
            stamp = manifest.stat().st_mtime_ns
        except (InputError, FileNotFoundError):
            self._open.pop(name, None)
            raise UnknownClip(
                f"clip {name[:63]!r} is unknown; exported are: {', '.join(self.names()) or 'none'}"
            ) from None
        if name not in self._open or self._open[name][0] != stamp:
            self._open[name] = stamp, self._opened(manifest)
        return self._open[name][1]

    def _opened(self, manifest: Path) -> Engine:
        try:
            base = ClipInfo.from_json(read_json(manifest)).exported_base
            if base not in self._bases:
                self._bases[base] = onnxruntime.OnnxBase.open(self._folder / "base" / base)
            return onnxruntime.OnnxEngine.open(manifest.parent, self._bases[base])
        except (ValueError, KeyError) as error:
            # The client gave nothing wrong: not an InputError any more.
            raise RuntimeError(f"clip {manifest.parent.name} cannot be opened: {error}") from error


def answer(
    tensors: Mapping[str, np.ndarray], clips: Callable[[str], Engine], send: Send, is_cancelled: Callable[[], bool]
) -> dict[str, np.ndarray]:
    """Answers one request: sends a progress response after every step and returns the last response.

    `tensors` are STREAM_INPUTS, responses STREAM_OUTPUTS. Raises InputError for a bad request, UnknownClip, and
    ddim.Stopped within one step of `is_cancelled`.
    """
    if is_cancelled():
        raise Stopped
    asked = from_tensors(tensors)
    config = asked.edit
    editing.check(config)
    engine = clips(asked.clip)

    def on_progress(stage: str, step: int, steps: int) -> bool:
        if is_cancelled():
            return False
        send(_progress(stage, step, steps))
        return True

    frames = editing.edit(engine, config, on_progress=on_progress)
    steps = config.steps * len(config.prompts)
    return {**_progress("done", steps, steps), "frames": frames, "fps": np.array([engine.info.fps], np.float32)}


def _progress(stage: str, step: int, steps: int) -> dict[str, np.ndarray]:
    return {
        "stage": np.array([stage.encode()], np.object_),
        "step": np.array([step], np.int32),
        "steps": np.array([steps], np.int32),
    }


def status(error: Exception) -> Status:
    """What a failure is called on the wire."""
    match error:
        case UnknownClip():
            return "NOT_FOUND"
        case InputError():
            return "INVALID_ARG"
        case Stopped():
            return "CANCELLED"
    return "INTERNAL"


def message(error: Exception) -> str:
    """What the client is told of a failure."""
    if isinstance(error, Stopped):
        return "the edit was cancelled"
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}".splitlines()[0]


class TritonPythonModel:
    """The model as the Python backend drives it."""

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        self._pb: Any = pb_utils
        self._clips = Clips(Path(args["model_repository"]) / args["model_version"])
        # onnxruntime's own threads take every core; torch does small sums only and must not compete with them.
        torch.set_num_threads(1)
        pb_utils.Logger.log_info(f"clips: {', '.join(self._clips.names()) or 'none'}")

    def execute(self, requests: list[Any]) -> None:
        """Answers requests one after the other; the next ones wait in Triton's queue."""
        for request in requests:
            self._respond(request)

    def _respond(self, request: Any) -> None:
        sender = request.get_response_sender()
        self._pb.Logger.log_info(f"request {request.request_id()!r} begins")  # Server reads this
        started = time.perf_counter()
        ended = "ok"
        try:
            last = self._response(
                answer(self._inputs(request), self._clips.get, self._sender(sender), sender.is_cancelled)
            )
        except Exception as error:  # whatever a request does, the process lives
            ended = status(error)
            if ended == "INTERNAL":
                self._pb.Logger.log_error(traceback.format_exc())
            code = getattr(self._pb.TritonError, ended)
            last = self._pb.InferenceResponse(error=self._pb.TritonError(message(error), code))
        sender.send(last, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self._pb.Logger.log_info(f"request {request.request_id()!r}: {ended} in {time.perf_counter() - started:.3f} s")

    def _inputs(self, request: Any) -> dict[str, np.ndarray]:
        found = {t.name: self._pb.get_input_tensor_by_name(request, t.name) for t in STREAM_INPUTS}
        return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}

    def _sender(self, sender: Any) -> Send:
        return lambda tensors: sender.send(self._response(tensors))

    def _response(self, tensors: dict[str, np.ndarray]) -> Any:
        return self._pb.InferenceResponse([self._pb.Tensor(name, array) for name, array in tensors.items()])
