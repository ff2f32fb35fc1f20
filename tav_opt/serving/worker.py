"""The streaming model as the Python backend of NVIDIA Triton Inference Server drives it: a thin face of `edits`."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tav_opt.config import literal_weights
from tav_opt.contract import STREAM_INPUTS
from tav_opt.ddim import Stopped
from tav_opt.engines.registry import Choice, best_device
from tav_opt.repository.model_files import read_parameters
from tav_opt.serving import envelope, log, tracing
from tav_opt.serving.caller import Line
from tav_opt.serving.failures import DeadlinePassed, message, status
from tav_opt.serving.host.probe import REQUEST_ID
from tav_opt.serving.host_socket import WorkerEnd
from tav_opt.serving.metrics import Metrics
from tav_opt.serving.opening import open_editor, warm_up
from tav_opt.serving.report import Report

Inputs = dict[str, np.ndarray]
"""STREAM_INPUTS."""


def device_of(args: dict[str, str], on_trouble: Callable[[str], None]) -> torch.device:
    """The device that Triton placed a model instance on, or the processor where PyTorch cannot use that GPU."""
    best = best_device(on_trouble)
    if best.type == "cuda" and args["model_instance_kind"] == "GPU":
        return torch.device("cuda", int(args["model_instance_device_id"]))
    return torch.device("cpu")


class TritonPythonModel:
    """The model as the Python backend drives it."""

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        self._pb: Any = pb_utils
        self._config = config = read_parameters(json.loads(args["model_config"]))
        self._told_of_weights = False
        self._host = WorkerEnd(args["model_instance_name"])
        self._room = threading.Semaphore(config.batch_requests)
        self._counting = threading.Lock()
        self._editor, self._clips = open_editor(
            Path(args["model_repository"]) / args["model_version"],
            config,
            device=device_of(args, pb_utils.Logger.log_warn),
            instance=args["model_instance_name"],
            on_choice=self._say_choice,
            on_trouble=pb_utils.Logger.log_warn,
        )
        self._clips.check_engine()
        self._spans = tracing.Spans.open()
        self._logs_json = os.environ.get(log.VARIABLE) == "json"
        self._metrics = Metrics(pb_utils, args["model_instance_name"])
        self._warm_up()
        self._set_gauges(disk=True)
        self._host.ready()

    def _say_choice(self, base: str, choice: Choice) -> None:
        self._pb.Logger.log_info(f"base {base}: {choice}")
        self._host.opened(base, str(choice))

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
        """Takes requests in hand, and returns when there is room for the next one; it waits in Triton's queue.

        That hands over one at a time: requests that have no batch axis it does not put together.
        """
        for request in requests:
            inputs = self._inputs(request)
            self._room.acquire()
            if self._config.batch_requests == 1:
                self._work(request, inputs)
            else:
                threading.Thread(target=self._work, args=(request, inputs), daemon=True).start()
        with self._room:
            pass

    def _work(self, request: Any, inputs: Future[Inputs]) -> None:
        try:
            with self._host.in_hand(probe=envelope.request_id(request) == REQUEST_ID):
                self._respond(request, inputs)
        finally:
            self._room.release()

    def _respond(self, request: Any, inputs: Future[Inputs]) -> None:
        sender, report = request.get_response_sender(), Report(id=envelope.request_id(request))
        probed = report.id == REQUEST_ID
        if not probed:
            self._pb.Logger.log_info(f"request {report.id!r} begins")
        above = {} if self._spans is None or probed else tracing.carrier(request)
        began, at = time.perf_counter(), time.time_ns()
        last, ended = self._answer(request, inputs, sender, report)
        seconds = time.perf_counter() - began
        counted = not probed or bool(report.steps)  # an edit by that name is an edit
        if counted:
            with self._counting:
                self._metrics.ended(ended, seconds, report)  # before the client can ask for them
                self._set_gauges(disk=report.inversion == "computed")
        self._mention_weights(report)
        sender.send(last, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        if counted:
            self._pb.Logger.log_info(self._line(report, ended, seconds))
            if self._spans is not None:
                self._spans.send(report, ended, at, time.time_ns(), above)

    def _line(self, report: Report, ended: str, seconds: float) -> str:
        """Of a request that ended, for the log."""
        prompts, summary = self._config.log_prompts, f"request {report.id!r}: {ended} in {seconds:.3f} s"
        if not self._logs_json:
            return f"{summary} {report.line(prompts=prompts)}"
        told = {"message": summary, "request_id": report.id, "status": ended, "seconds": round(seconds, 3)}
        return json.dumps({**told, **report.fields(prompts=prompts)})

    def finalize(self) -> None:
        """The server ends."""
        if self._spans is not None:
            self._spans.close()

    def _mention_weights(self, report: Report) -> None:
        """Once: of prompts in another program's syntax."""
        edit = report.request.edit if report.request is not None else None
        if edit is None or self._told_of_weights or literal_weights((*edit.prompts, edit.negative_prompt)) is None:
            return
        self._told_of_weights = True
        self._pb.Logger.log_warn(f"request {report.id!r}: a prompt has weights, (word:1.3) or the like: read as words")

    def _answer(self, request: Any, inputs: Future[Inputs], sender: Any, report: Report) -> tuple[Any, str]:
        """Sends all responses but the last, which it returns with how the request ended."""
        line = None
        try:
            read = envelope.read(request, (tensor.name for tensor in STREAM_INPUTS), caller=True)
            line = None if read.caller is None else Line(read.caller)
            go_on = partial(self._go_on, sender, line, _deadline(read.timeout_us))
            send = self._send(request, sender, report)
            last = self._editor.answer(inputs.result(), send, go_on, report)
            return self._response(request, last, report), "OK"
        except Exception as error:  # whatever a request does, the process lives
            ended = status(error)
            if ended == "INTERNAL":
                self._pb.Logger.log_error(traceback.format_exc())
            # A response like others: errors on a stream crash Triton 2.51 where the client wants their gRPC status.
            told = np.array([ended.encode(), message(error).encode()], np.object_)
            return self._response(request, {"error": told}, report), ended
        finally:
            if line is not None:
                line.close()

    def _go_on(self, sender: Any, line: Line | None, deadline: tuple[float, float] | None) -> None:
        """Raises ddim.Stopped when the client has gone, has cancelled, or has set a deadline that is over."""
        if sender.is_cancelled() or (line is not None and line.is_hung_up()):
            raise Stopped
        if deadline is not None and time.monotonic() > deadline[0]:
            raise DeadlinePassed(f"the edit was stopped: its timeout of {deadline[1]:g} s passed")

    def _inputs(self, request: Any) -> Future[Inputs]:
        """Copied, for they lie in memory that Triton may take back when `execute` returns; or why they cannot be."""
        read: Future[Inputs] = Future()
        try:
            found = {t.name: self._pb.get_input_tensor_by_name(request, t.name) for t in STREAM_INPUTS}
            read.set_result({name: np.array(t.as_numpy()) for name, t in found.items() if t is not None})
        except Exception as error:
            read.set_exception(error)
        return read

    def _send(self, request: Any, sender: Any, report: Report) -> Callable[[dict[str, np.ndarray]], None]:
        return lambda tensors: sender.send(self._response(request, tensors, report))

    def _response(self, request: Any, tensors: dict[str, np.ndarray], report: Report) -> Any:
        tensors = {**tensors, "request_id": np.array([report.id.encode()], np.object_)}
        tensors = envelope.asked_for(request, tensors)
        report.sent_bytes += sum(map(_bytes, tensors.values()))
        return self._pb.InferenceResponse([self._pb.Tensor(name, array) for name, array in tensors.items()])

    def _set_gauges(self, *, disk: bool) -> None:
        """`disk`: the cache's folder too, whose every file is looked at."""
        clips, clips_bytes = self._clips.resident()
        inversions = self._editor.inversions
        self._metrics.set(
            clips_resident=clips,
            clips_bytes=clips_bytes,
            inversions_memory_bytes=inversions.memory_bytes(),
            memory_free_bytes=self._editor.memory.free(),
        )
        if disk:
            self._metrics.set(inversions_disk_bytes=inversions.disk_bytes())


def _bytes(tensor: np.ndarray) -> int:
    return sum(map(len, tensor)) if tensor.dtype == np.object_ else tensor.nbytes


def _deadline(timeout_us: int) -> tuple[float, float] | None:
    """When the timeout is over, counted from now, and the timeout in seconds; None where there is none."""
    seconds = timeout_us / 1e6
    return (time.monotonic() + seconds, seconds) if seconds > 0 else None
