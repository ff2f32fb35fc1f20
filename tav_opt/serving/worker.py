"""The streaming model as the Python backend of NVIDIA Triton Inference Server drives it: a thin face of `edits`."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tav_opt.contract import STREAM_INPUTS
from tav_opt.ddim import Stopped
from tav_opt.engines.onnxruntime import best_device
from tav_opt.model_repository import read_parameters
from tav_opt.serving.caller import Line
from tav_opt.serving.failures import DeadlinePassed, message, status
from tav_opt.serving.metrics import Metrics
from tav_opt.serving.opening import open_editor, warm_up
from tav_opt.serving.probe import REQUEST_ID
from tav_opt.serving.report import Report


def device_of(args: dict[str, str]) -> torch.device:
    """The device that Triton placed a model instance on, or the processor where onnxruntime cannot use that GPU."""
    best = best_device()
    if best.type == "cuda" and args["model_instance_kind"] == "GPU":
        return torch.device("cuda", int(args["model_instance_device_id"]))
    return torch.device("cpu")


class TritonPythonModel:
    """The model as the Python backend drives it."""

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        self._pb: Any = pb_utils
        self._config = config = read_parameters(json.loads(args["model_config"]))
        self._editor, self._clips = open_editor(
            Path(args["model_repository"]) / args["model_version"],
            config,
            device=device_of(args),
            instance=args["model_instance_name"],
            on_trouble=pb_utils.Logger.log_warn,
        )
        self._metrics = Metrics(pb_utils, args["model_instance_name"])
        self._warm_up()
        self._set_gauges(disk=True)

    def _warm_up(self) -> None:
        began, bases = time.perf_counter(), set[str]()
        for name in self._clips.names():
            try:
                engine = self._clips.get(name)
                if engine.info.exported_base not in bases:
                    bases.add(engine.info.exported_base)
                    warm_up(engine)
            except Exception as error:  # that clip is refused when it is asked for; the others are served
                self._pb.Logger.log_error(message(error))
        spent = time.perf_counter() - began
        self._pb.Logger.log_info(f"clips: {', '.join(self._clips.names()) or 'none'}; warm in {spent:.1f} s")

    def execute(self, requests: list[Any]) -> None:
        """Answers requests one after the other; the next ones wait in Triton's queue."""
        for request in requests:
            self._respond(request)

    def _respond(self, request: Any) -> None:
        sender, report = request.get_response_sender(), Report()
        probed = request.request_id() == REQUEST_ID
        if not probed:
            self._pb.Logger.log_info(f"request {request.request_id()!r} begins")  # Server reads this
        began = time.perf_counter()
        last, ended = self._answer(request, sender, report)
        seconds = time.perf_counter() - began
        counted = not probed or bool(report.steps)  # an edit by that name is an edit
        if counted:
            self._metrics.ended(ended, seconds, report)  # before the client can ask for them
            self._set_gauges(disk=report.inversion == "computed")
        sender.send(last, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        if counted:
            settings = report.line(prompts=self._config.log_prompts)
            self._pb.Logger.log_info(f"request {request.request_id()!r}: {ended} in {seconds:.3f} s {settings}")

    def _answer(self, request: Any, sender: Any, report: Report) -> tuple[Any, str]:
        """Sends all responses but the last, which it returns with how the request ended."""
        line = _line(request)
        try:
            go_on = partial(self._go_on, sender, line, _deadline(request))
            send = self._send(sender, report)
            return self._response(self._editor.answer(self._inputs(request), send, go_on, report), report), "OK"
        except Exception as error:  # whatever a request does, the process lives
            ended = status(error)
            if ended == "INTERNAL":
                self._pb.Logger.log_error(traceback.format_exc())
            # A response like others: errors on a stream crash Triton 2.51 where the client wants their gRPC status.
            told = np.array([ended.encode(), message(error).encode()], np.object_)
            return self._response({"error": told}, report), ended
        finally:
            if line is not None:
                line.close()

    def _go_on(self, sender: Any, line: Line | None, deadline: tuple[float, float] | None) -> None:
        """Raises ddim.Stopped when the client has gone, has cancelled, or has set a deadline that is over."""
        if sender.is_cancelled() or (line is not None and line.is_hung_up()):
            raise Stopped
        if deadline is not None and time.monotonic() > deadline[0]:
            raise DeadlinePassed(f"the edit was stopped: its timeout of {deadline[1]:g} s passed")

    def _inputs(self, request: Any) -> dict[str, np.ndarray]:
        found = {t.name: self._pb.get_input_tensor_by_name(request, t.name) for t in STREAM_INPUTS}
        return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}

    def _send(self, sender: Any, report: Report) -> Callable[[dict[str, np.ndarray]], None]:
        return lambda tensors: sender.send(self._response(tensors, report))

    def _response(self, tensors: dict[str, np.ndarray], report: Report) -> Any:
        report.sent_bytes += sum(map(_bytes, tensors.values()))
        return self._pb.InferenceResponse([self._pb.Tensor(name, array) for name, array in tensors.items()])

    def _set_gauges(self, *, disk: bool) -> None:
        """`disk`: the cache's folder too, whose every file is looked at."""
        clips, clips_bytes = self._clips.resident()
        inversions = self._editor.inversions
        self._metrics.set(
            clips_resident=clips, clips_bytes=clips_bytes, inversions_memory_bytes=inversions.memory_bytes()
        )
        if disk:
            self._metrics.set(inversions_disk_bytes=inversions.disk_bytes())


def _bytes(tensor: np.ndarray) -> int:
    return sum(map(len, tensor)) if tensor.dtype == np.object_ else tensor.nbytes


def _line(request: Any) -> Line | None:
    """To the model of this server that asked; None where a client did."""
    parameters = json.loads(request.parameters() or "{}")
    return Line(parameters["caller"]) if "caller" in parameters else None


def _deadline(request: Any) -> tuple[float, float] | None:
    """When the request's timeout is over, counted from now, and the timeout in seconds; None where it has none."""
    seconds = request.timeout() / 1e6
    return (time.monotonic() + seconds, seconds) if seconds > 0 else None
