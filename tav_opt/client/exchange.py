"""What goes over the wire in one edit, and what the answers mean: the half that threads and asyncio share."""

from __future__ import annotations

import json
import random
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import grpc
import numpy as np
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from tav_opt.config import FILLED_IN, EditConfig, Fit, InputError, PathLike, Preset, documented
from tav_opt.contract import (
    CLIPS_MODEL,
    STARTED_ANEW,
    STREAM_INPUTS,
    STREAM_MODEL,
    ServedClip,
    from_clip_tensors,
    to_tensors,
)

_BY_TRITON = (
    ("UNAVAILABLE", re.compile("exceeds maximum queue size|request timeout expired", re.IGNORECASE)),
    ("INTERNAL", re.compile("is not healthy")),
)
"""What Triton itself says on a stream has no status. The header that gives it one (triton_grpc_error) is not sent: with
it Triton 2.51 dies of errors. The worker's own failures come as the tensor `error`."""
WORKER_GONE = "is not healthy"
"""Of a worker process that died; whoever supervises it starts it anew."""
SERVED = {tensor.name for tensor in STREAM_INPUTS}
CLOCKS_SECONDS = 0.25
"""How much earlier than here a deadline may pass on the server."""
MAX_DEADLINE_SECONDS = 30 * 86_400


class ServerError(RuntimeError):
    """The server could not answer, through no fault of the request; `status` is the gRPC status, e.g. UNAVAILABLE.

    `request_id` is what the server's log calls the request, where it was sent.
    """

    def __init__(self, details: str, status: str, request_id: str = "") -> None:
        super().__init__(f"{details} ({status}{f', request {request_id}' if request_id else ''})")
        self.details, self.status, self.request_id = details, status, request_id


@documented
@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of an edit is done."""

    stage: str
    """invert, sample, or render, whose steps are the frames of a large result."""
    step: int
    """Steps done in this stage."""
    steps: int
    """Steps of this stage."""
    preview: np.ndarray | None = None
    """uint8 (prompts, f, h, w, 3) RGB at the latents' size, with the steps that have one."""


@documented
@dataclass(frozen=True, kw_only=True)
class Edit:
    """What the server made of a clip."""

    frames: np.ndarray
    """uint8 (prompts, f, H, W, 3) RGB; of length 0 where files were asked for."""
    fps: float
    videos: tuple[bytes, ...] = ()
    """An MP4 file of each prompt, where they were asked for."""
    request_id: str = ""
    """What the server's log calls the request."""
    sound: bytes | None = None
    """Of the video's file, as a Matroska file, at the video's speed; MP4 files have it already."""
    metadata: tuple[dict[str, Any], ...] = ()
    """What each says of itself; MP4 files carry it as their comment."""


@documented
class Options(TypedDict, total=False):
    """What else a request may say."""

    deadline_s: float | None
    """Seconds from now after which nobody waits for the edit any more; of all attempts together."""
    video: PathLike | bytes | None
    """A video to edit in the clip's place. Of a file, or a folder of images, frames are taken and fitted to the clip as
    `tune` does, by the next five; bytes of a file are sent as they are, and must have the clip's size."""
    frames: int | None
    """How many; default: as many as the clip has."""
    start: int
    """First frame."""
    stride: int
    """Take every so manieth frame."""
    uniform: bool
    """Spread the frames evenly over the video instead of start and stride."""
    fit: Fit
    """Centre crop that keeps the aspect, or squash."""
    source_frames: np.ndarray
    """uint8 (f, H, W, 3) RGB to edit in the clip's place."""
    mask: PathLike | bytes | None
    """White where the picture may change: an image, a video or a folder of images, fitted like the video; bytes of a
    video file are sent as they are."""
    maps: Mapping[str, np.ndarray | bytes]
    """What the edit's controls follow, by their names: uint8 (f, H, W, 3) RGB of the source's frames and the clip's
    size, or the bytes of a video file with such frames."""
    preview_interval: int
    """A preview with every so many steps; 0: none."""
    output: Literal["frames", "mp4"]
    fps: float | None
    """Frames a second of the result; default: the clip's, or those of a video's file; at others there is no sound."""
    sound: bytes | None
    """A Matroska file's, for MP4s of a source in the clip's place; that of a video's file unless given."""
    prompt_metadata: bool
    """True: the metadata names the prompts."""
    preset: Preset
    """Cheaper settings for those that are left out."""
    left_out: Collection[str]
    """Of config.FILLED_IN, the settings in whose place the preset's or the clip's own stand; of prompts alone, all."""


@documented
@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often and how patiently a request that no worker began is sent again.

    Only such a request is: the server was not reached, its queue was full, memory was short, or its worker had died,
    and no answer had come. The pauses double, up to the longest, and are shortened at random by up to a half, so that
    many clients do not return at once.
    """

    attempts: int = 6
    """1: never again."""
    first_pause_s: float = 0.5
    longest_pause_s: float = 8.0
    on_pause: Callable[[str, float], Any] | None = None
    """Called before each pause with what failed and the pause's seconds."""

    def pauses(self) -> Iterator[float]:
        """Seconds before each further attempt."""
        for number in range(self.attempts - 1):
            yield min(self.first_pause_s * 2**number, self.longest_pause_s) * random.uniform(0.5, 1.0)


class Exchange:
    """One edit, or question, from its first attempt to its last answer.

    `deadline_s` is counted from here and spans all attempts; the server drops a request that waits beyond it.
    """

    def __init__(
        self, tensors: Mapping[str, np.ndarray], *, retry: Retry, deadline_s: float | None, model: str = STREAM_MODEL
    ) -> None:
        if deadline_s is not None and not 0 < deadline_s < MAX_DEADLINE_SECONDS:
            raise InputError(f"deadline {deadline_s} s is not above 0 and below {MAX_DEADLINE_SECONDS}")
        self.request_id = secrets.token_hex(6)
        self._message = _message(model, tensors)
        self._message.id = self.request_id
        self._retry, self._pauses = retry, retry.pauses()
        self._ends = None if deadline_s is None else time.monotonic() + deadline_s
        self._answered = False
        self._parts: list[np.ndarray] = []
        self._frames = 0
        self._sound: bytes | None = None

    @classmethod
    def of(cls, clip: str, edit: EditConfig | Sequence[str], options: Options, retry: Retry) -> Exchange:
        """An edit of `clip`; prompts alone stand for EditConfig(prompts=…) with the clip's own settings."""
        config = EditConfig.of(edit)
        asked: dict[str, Any] = dict(options)
        left_out = asked.pop("left_out", () if isinstance(edit, EditConfig) else FILLED_IN)
        deadline_s = asked.pop("deadline_s", None)
        sound = asked.pop("sound", None)
        asked["control_videos"] = control_videos(config, asked.pop("maps", {}))
        if unknown := sorted(set(asked) - SERVED - {"control_videos"}):
            raise InputError(f"no option {unknown[0]!r}; there are {', '.join(sorted(Options.__annotations__))}")
        exchange = cls(to_tensors(clip, config, left_out=left_out, **asked), retry=retry, deadline_s=deadline_s)
        exchange._sound = sound
        return exchange

    @classmethod
    def about(cls, clip: str | None, retry: Retry, deadline_s: float | None) -> Exchange:
        """A question about a clip, or about all, whose answer `told` reads."""
        asked = {} if clip is None else {"clip": np.array([clip.encode()], np.object_)}
        return cls(asked, retry=retry, deadline_s=deadline_s, model=CLIPS_MODEL)

    @staticmethod
    def told(response: service_pb2.ModelInferResponse) -> dict[str, ServedClip]:
        """By name what clips are, and what they take."""
        return from_clip_tensors(_tensors(response))

    def request(self) -> tuple[service_pb2.ModelInferRequest, float | None]:
        """What to send, and within how many seconds it must be answered."""
        left = self._left()
        if left is not None:
            self._message.parameters["timeout"].int64_param = max(1, int(left * 1e6))
        return self._message, left

    def answer(self, message: Any) -> Progress | Edit:
        """What a message of the stream says; raises ServerError where it carries an error."""
        if message.error_message:
            raise ServerError(message.error_message, _status(message.error_message))
        response = message.infer_response
        tensors = _tensors(response)
        if "error" in tensors:
            status, details = (text.decode() for text in tensors["error"])
            raise ServerError(details, status)
        self._answered = True
        if response.parameters["triton_final_response"].bool_param:
            return self._edit(tensors)
        stage, step, steps = (tensors[name][0] for name in ("stage", "step", "steps"))
        if "frames" in tensors:
            self._parts.append(tensors["frames"])
            self._frames = int(steps)
        return Progress(stage=stage.decode(), step=int(step), steps=int(steps), preview=tensors.get("preview"))

    def pause(self, error: ServerError) -> float | None:
        """Seconds to wait before the next attempt after `error`; None: there is none."""
        if self._answered or not _no_worker_began(error):
            return None
        pause, left = next(self._pauses, None), self._left()
        if pause is None or (left is not None and pause >= left):
            return None
        if self._retry.on_pause is not None:
            self._retry.on_pause(str(error), pause)
        return pause

    def blamed(self, error: ServerError) -> InputError | ServerError:
        """The exception for the user: what the request is to blame for is an InputError."""
        if error.status in ("INVALID_ARGUMENT", "NOT_FOUND"):
            return InputError(error.details)
        return ServerError(error.details, error.status, self.request_id)

    def is_unanswered(self, error: ServerError) -> bool:
        """Whether there may be no server at all."""
        return not self._answered and error.status == "UNAVAILABLE"

    def no_result(self) -> ServerError:
        """The stream ended early; at the deadline the server may be the first to notice."""
        left = self._left()
        if left is not None and left < CLOCKS_SECONDS:
            return ServerError("the deadline has passed", "DEADLINE_EXCEEDED")
        return ServerError("the server ended the edit without a result", "INTERNAL")

    def _edit(self, tensors: Mapping[str, np.ndarray]) -> Edit:
        if self._parts and sum(part.shape[1] for part in self._parts) == self._frames:
            tensors = {**tensors, "frames": np.concatenate(self._parts, axis=1)}
        if not {"frames", "video"} & set(tensors):
            raise self.no_result()
        return Edit(
            frames=tensors.get("frames", np.empty((0, 0, 0, 0, 3), np.uint8)),
            fps=float(tensors["fps"][0]),
            videos=tuple(self._sounding(file) for file in tensors.get("video", ())),
            request_id=self.request_id,
            sound=self._sound,
            metadata=tuple(map(json.loads, tensors.get("metadata", ()))),
        )

    def _sounding(self, mp4: bytes) -> bytes:
        if self._sound is None:
            return mp4
        from tav_opt.video import sound  # av is not needed elsewhere in the client

        return sound.added(mp4, self._sound)

    def _left(self) -> float | None:
        return None if self._ends is None else max(0.0, self._ends - time.monotonic())


def control_videos(config: EditConfig, maps: Mapping[str, np.ndarray | bytes]) -> list[bytes]:
    """In the order of the edit's controls; frames as files that give them back as they are."""
    names = [one.name for one in config.controls]
    if different := sorted(set(names) ^ set(maps)):
        raise InputError(f"{different[0]!r} is among the edit's controls or the maps, not among both")
    if not names:
        return []
    from tav_opt.video.lossless import encode_mkv  # av is not needed elsewhere in the client

    found = [maps[name] for name in names]
    return [one if isinstance(one, bytes) else encode_mkv(one) for one in found]


def _status(refusal: str) -> str:
    return next((status for status, words in _BY_TRITON if words.search(refusal)), "UNKNOWN")


def failed(error: grpc.RpcError) -> ServerError:
    """How a call ended."""
    return ServerError(error.details() or "", error.code().name)


def is_gateway(error: grpc.RpcError) -> bool:
    """Whether a gateway refused that has no server behind it for the moment."""
    return STARTED_ANEW in (error.details() or "")


def _no_worker_began(error: ServerError) -> bool:
    return error.status == "UNAVAILABLE" or (error.status == "INTERNAL" and WORKER_GONE in error.details)


def _message(model: str, tensors: Mapping[str, np.ndarray]) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name=model)
    for name, array in tensors.items():
        message.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype) or "", shape=array.shape)
        if message.inputs[-1].datatype == "":
            raise InputError(f"{name} is {array.dtype}, which the server does not take")
        message.raw_input_contents.append(_content(array))
    return message


def _content(array: np.ndarray) -> bytes:
    if array.dtype == np.object_ and array.size:
        return serialize_byte_tensor(array).item()
    return array.tobytes()


def _tensors(response: service_pb2.ModelInferResponse) -> dict[str, np.ndarray]:
    result = InferResult(response)
    return {output.name: result.as_numpy(output.name) for output in response.outputs}
