"""What is said between clients and the server: requests, and what is known of clips, as tensors and back."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from tav_opt.clip_info import VERSION as VERSION
from tav_opt.clip_info import ClipInfo as ClipInfo
from tav_opt.clip_info import edit_metadata as edit_metadata
from tav_opt.config import (
    EDIT_DEFAULTS,
    FILLED_IN,
    Control,
    EditConfig,
    Fps,
    InputError,
    Preset,
    check_preset,
    documented,
)
from tav_opt.served_tensors import CLIPS_INPUTS as CLIPS_INPUTS
from tav_opt.served_tensors import CLIPS_OUTPUTS, NUMPY, OF_CONTROLS, STREAM_INPUTS, WORDS, ServedTensor
from tav_opt.served_tensors import CONTROL_INPUTS as CONTROL_INPUTS
from tav_opt.served_tensors import STREAM_OUTPUTS as STREAM_OUTPUTS
from tav_opt.served_tensors import UNARY_INPUTS as UNARY_INPUTS
from tav_opt.served_tensors import UNARY_OUTPUTS as UNARY_OUTPUTS

STREAM_MODEL = "tune_a_video_stream"
"""The decoupled model: progress responses, then the frames. Over gRPC streams."""
UNARY_MODEL = "tune_a_video"
"""The same edit as one response, for HTTP and plain `infer()`; the same request again is answered from a cache."""
CLIPS_MODEL = "tune_a_video_clips"
"""What a clip takes: one response at once, whatever the edits do."""

CLIP_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")

STARTED_ANEW = "started anew"
"""Words of every refusal by a gateway behind which no server is, for the moment."""
_OF_THE_QUEUE = re.compile(r"exceeds maximum queue size|request timeout expired", re.IGNORECASE)

MAX_PROMPTS = 8
MAX_WORDS = 64
MAX_CONTROLS = MAX_PROMPTS
MAX_TEXT_BYTES = 4096
"""Of one text; the tokenizer's own limit, some 77 tokens, is far below."""
MAX_VIDEO_BYTES = 64 << 20
"""Of a video file in a request."""

Output = Literal["frames", "mp4"]
FPS = get_args(Fps)[1]
"""Within which speeds of a result lie."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What a client asks for: a clip and how to edit it, or in its place a video of its size."""

    clip: str
    edit: EditConfig
    video: bytes | None = None
    """A video file at the clip's size, with as many frames as its network takes at once, or more."""
    source_frames: np.ndarray | None = None
    """uint8 (f, H, W, 3) RGB, of the same kind."""
    mask: bytes | None = None
    """A video file of the source's size, of one frame or as many: white where the picture may change."""
    control_videos: tuple[bytes, ...] = ()
    """Of the edit's controls, in their order: video files of the source's size, of as many frames."""
    preview_interval: int = 0
    """A preview every so many steps of sampling; 0: none."""
    output: Output = "frames"
    fps: float | None = None
    """Frames a second of the result; those of the clip, unless given."""
    preset: Preset = "exact"
    given: frozenset[str] = frozenset()
    """Names of the edit's settings that were given: the preset's, or else the clip's own, stand for the others."""
    prompt_metadata: bool = False
    """Whether `metadata` and MP4 files name the prompts."""


@documented
@dataclass(frozen=True, kw_only=True)
class ServedClip:
    """What a client may know of an exported clip."""

    frames: int
    """How many; a source in the clip's place may have others, as many as the clip's network takes at once or more."""
    height: int
    """Of the frames, and of a source's."""
    width: int
    """Of the frames, and of a source's."""
    fps: float
    """Frames a second."""
    prompt: str
    """The caption that it was tuned on."""
    inversion_steps: int
    """Of the inversion that is kept with it."""


def same_speed(fps: float | None, other: float) -> bool:
    """Whether frames a second are as many, which are float32 on the wire, or none are asked for."""
    return fps is None or math.isclose(fps, other, rel_tol=1e-6)


def status_of_refusal(message: str) -> str:
    """The gRPC status that Triton's own refusal of a request should have, which it does not tell on a stream."""
    if _OF_THE_QUEUE.search(message):
        return "UNAVAILABLE"
    return "INTERNAL" if "is not healthy" in message else "INVALID_ARGUMENT"


def check_clip_name(name: str) -> str:
    """The name itself; raises InputError unless it is 1…63 of a-z 0-9 _ - and starts with a letter or digit."""
    if not CLIP_NAME.match(name):
        raise InputError(f"clip name {name!r} is not 1…63 lower-case letters, digits, '_' or '-'")
    return name


def to_tensors(
    clip: str,
    config: EditConfig,
    *,
    video: bytes | None = None,
    source_frames: np.ndarray | None = None,
    mask: bytes | None = None,
    control_videos: Sequence[bytes] = Request.control_videos,
    preview_interval: int = Request.preview_interval,
    output: Output = Request.output,
    fps: float | None = Request.fps,
    prompt_metadata: bool = Request.prompt_metadata,
    preset: Preset = Request.preset,
    left_out: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """A request as the tensors of STREAM_INPUTS; raises InputError for numbers that do not fit their dtype.

    Settings that are `left_out` are the preset's or the clip's. Without a preview the tensors are those of UNARY_INPUTS
    too. Raises InputError for a preset that `check_preset` refuses.
    """
    check_preset(preset, set(FILLED_IN) - set(left_out))
    values: dict[str, Any] = {"clip": clip, "prompt": list(config.prompts), "video": video, "output": output}
    values |= {"source_frames": source_frames, "mask": mask, "preview_interval": preview_interval or None}
    values |= {"fps": fps} | _control_values(config, control_videos)
    # Servers of before do not know these inputs.
    values |= {"prompt_metadata": prompt_metadata or None, "preset": None if preset == "exact" else preset}
    usual = {name for name in set(FILLED_IN) - set(EDIT_DEFAULTS) if getattr(config, name) == getattr(EditConfig, name)}
    absent = {*left_out, *(usual if preset == "exact" else ())}
    settings = [t.name for t in STREAM_INPUTS if t.name not in values]
    values |= {name: None if name in absent else getattr(config, name) for name in settings}
    values |= {name: list(values[name]) or None for name in WORDS}
    return {t.name: _to_tensor(t, values[t.name]) for t in STREAM_INPUTS if values[t.name] is not None}


def _control_values(config: EditConfig, videos: Sequence[bytes]) -> dict[str, Any]:
    """Of the inputs that tell of controls; None where all is as it is without them."""
    if len(videos) != len(config.controls):
        raise InputError(f"{len(videos)} videos of maps for {len(config.controls)} controls: each needs one")
    numbers = {name: [getattr(one, name) for one in config.controls] for name in OF_CONTROLS}
    return {
        "control": [one.name for one in config.controls] or None,
        "control_video": list(videos) or None,
        "control_inversion": config.control_inversion or None,
        **{
            f"control_{name}": found if any(value != getattr(Control, name) for value in found) else None
            for name, found in numbers.items()
        },
    }


def _to_tensor(tensor: ServedTensor, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    values = value if isinstance(value, list) else [value]
    if tensor.dtype == "STRING":
        return np.array([item if isinstance(item, bytes) else item.encode() for item in values], dtype=np.object_)
    try:
        return np.array(values, dtype=NUMPY[tensor.dtype])
    except OverflowError:
        raise InputError(f"{tensor.name} {value} does not fit {tensor.dtype}") from None


def to_clip_tensors(infos: Mapping[str, ClipInfo]) -> dict[str, np.ndarray]:
    """What a client may know of clips, by name, as the tensors of CLIPS_OUTPUTS."""
    told = {t.name: [getattr(info, t.name) for info in infos.values()] for t in CLIPS_OUTPUTS[1:]} | {"clip": [*infos]}
    return {tensor.name: _to_tensor(tensor, told[tensor.name]) for tensor in CLIPS_OUTPUTS}


def from_clip_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, ServedClip]:
    """The inverse of `to_clip_tensors`; servers of before tell no name, which is then empty."""
    values = {"clip": [b""], **{name: array.tolist() for name, array in tensors.items()}}
    names, prompts = ([text.decode() for text in values.pop(name)] for name in ("clip", "prompt"))
    rows = zip(*values.values(), strict=True)
    told = (dict(zip(values, row, strict=True)) for row in rows)
    return {n: ServedClip(prompt=p, **one) for n, p, one in zip(names, prompts, told, strict=True)}


def from_tensors(tensors: Mapping[str, np.ndarray]) -> Request:
    """What a request's tensors ask for: the inverse of `to_tensors`.

    Raises InputError for tensors that are missing, unknown, of another dtype or shape, too large, or are not text, and
    for values that make no sense together. Whether the settings of the edit make sense is for `editing.check` to say,
    whether a source has the clip's size for the clip.
    """
    known = {t.name: t for t in STREAM_INPUTS}
    if unknown := sorted(set(tensors) - set(known)):
        raise InputError(f"input {unknown[0]!r} is unknown; there are {', '.join(known)}")
    if missing := [t.name for t in STREAM_INPUTS if not t.optional and t.name not in tensors]:
        raise InputError(f"input {missing[0]!r} is missing")
    values = {name: _from_tensor(known[name], tensor) for name, tensor in tensors.items()}
    prompts = values.pop("prompt")
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InputError(f"{len(prompts)} prompts: 1…{MAX_PROMPTS} make a request")
    words = {name: tuple(values.pop(name)) for name in WORDS if name in values}
    for name, found in words.items():
        if not 1 <= len(found) <= MAX_WORDS:
            raise InputError(f"{len(found)} {name}: 1…{MAX_WORDS} make sense, or none and no such input")
    settings = {f.name: values.pop(f.name)[0] for f in fields(EditConfig) if f.name in values} | words
    controls, videos = _controls(values)
    frames = values.pop("source_frames", None)
    request = Request(
        edit=EditConfig(prompts=tuple(prompts), controls=controls, **settings),
        control_videos=videos,
        source_frames=frames,
        given=frozenset(settings),
        **{name: value[0] for name, value in values.items()},
    )
    check_request(request)
    return request


def _controls(values: dict[str, Any]) -> tuple[tuple[Control, ...], tuple[bytes, ...]]:
    """What is told of controls, taken out of the values, and their videos."""
    told = {name: values.pop(f"control_{name}") for name in ("video", *OF_CONTROLS) if f"control_{name}" in values}
    if "control" not in values and not told:
        return (), ()
    names = values.pop("control", [])
    if not 1 <= len(names) <= MAX_CONTROLS:
        raise InputError(f"{len(names)} controls: 1…{MAX_CONTROLS} make sense, or none and no such input")
    for kind, found in {"video": [], **told}.items():
        if len(found) != len(names):
            raise InputError(f"input control_{kind} has {len(found)} entries for {len(names)} controls")
    videos = told.pop("video")
    made = (
        Control(name=check_clip_name(name), **{kind: float(found[number]) for kind, found in told.items()})
        for number, name in enumerate(names)
    )
    return tuple(made), tuple(videos)


def check_request(request: Request) -> None:
    """Raises InputError for values that make no sense together."""
    if request.output not in get_args(Output):
        raise InputError(f"output {request.output[:63]!r} is not {' or '.join(get_args(Output))}")
    check_preset(request.preset, request.given)
    if request.fps is not None and request.fps not in FPS:
        raise InputError(f"fps {request.fps:g} is not within {FPS}")
    if request.preview_interval < 0:
        raise InputError(f"preview_interval {request.preview_interval}: must be 0 (none) or more")
    sources = [name for name in ("video", "source_frames") if getattr(request, name) is not None]
    if len(sources) > 1:
        raise InputError(f"{' and '.join(sources)}: give one of them, or neither to edit the clip itself")
    if sources and not request.edit.inversion:
        raise InputError(f"{sources[0]} without inversion would not be looked at: leave it out, or invert")


def _from_tensor(tensor: ServedTensor, array: np.ndarray) -> Any:
    if array.dtype != NUMPY[tensor.dtype]:
        raise InputError(f"input {tensor.name} is {array.dtype}, not {tensor.dtype}")
    if len(array.shape) != len(tensor.shape) or any(
        free not in (-1, n) for free, n in zip(tensor.shape, array.shape, strict=True)
    ):
        raise InputError(f"input {tensor.name} has shape {list(array.shape)}, not {list(tensor.shape)}")
    if tensor.name in ("video", "mask", "control_video"):
        return [_video(tensor.name, item) for item in array]
    if tensor.dtype == "STRING":
        return [_text(tensor.name, item) for item in array]
    return array if len(tensor.shape) > 1 else array.tolist()


def _video(name: str, value: bytes) -> bytes:
    if len(value) > MAX_VIDEO_BYTES:
        raise InputError(f"input {name} has {len(value)} bytes, {MAX_VIDEO_BYTES} at most")
    return value


def _text(name: str, value: bytes) -> str:
    if len(value) > MAX_TEXT_BYTES:
        raise InputError(f"input {name} has {len(value)} bytes, {MAX_TEXT_BYTES} at most")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"input {name} is not UTF-8: {error}") from None
