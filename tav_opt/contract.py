"""Names, dtypes and shapes of every served tensor, and what is known of a clip. Declared here, once."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from tav_opt import __version__
from tav_opt.config import (
    EDIT_DEFAULTS,
    FILLED_IN,
    PRESETS,
    ClipConfig,
    Control,
    EditConfig,
    EngineName,
    Fps,
    InputError,
    InversionConfig,
    Preset,
    check_numbers,
    check_preset,
    documented,
)

E = TypeVar("E", bound=EditConfig)

VERSION = 1
"""Of the exported files and the served tensors; another version is refused."""

STREAM_MODEL = "tune_a_video_stream"
"""The decoupled model: progress responses, then the frames. Over gRPC streams."""
UNARY_MODEL = "tune_a_video"
"""The same edit as one response, for HTTP and plain `infer()`; the same request again is answered from a cache."""
CLIPS_MODEL = "tune_a_video_clips"
"""What a clip takes: one response at once, whatever the edits do."""

CLIP_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")

DType = Literal["STRING", "FP32", "INT32", "INT64", "UINT8", "UINT64", "BOOL"]


NUMPY: dict[DType, Any] = {
    "STRING": np.object_,
    "FP32": np.float32,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT64": np.uint64,
    "BOOL": np.bool_,
}
"""Strings are UTF-8 bytes in arrays of objects."""


@dataclass(frozen=True, kw_only=True)
class ServedTensor:
    """One input or output of a served model; −1 in its shape is free."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    doc: str
    optional: bool = False


STREAM_INPUTS = (
    ServedTensor(name="clip", dtype="STRING", shape=(1,), doc="name of an exported clip"),
    ServedTensor(name="prompt", dtype="STRING", shape=(-1,), doc="what to draw; several prompts give several edits"),
    ServedTensor(name="negative_prompt", dtype="STRING", shape=(1,), doc="what to stay away from", optional=True),
    ServedTensor(name="steps", dtype="INT32", shape=(1,), doc="sampling steps", optional=True),
    ServedTensor(name="guidance_scale", dtype="FP32", shape=(1,), doc="classifier-free guidance", optional=True),
    ServedTensor(
        name="preset", dtype="STRING", shape=(1,), doc="exact, fast or draft: for settings left out", optional=True
    ),
    ServedTensor(name="solver", dtype="STRING", shape=(1,), doc="ddim, dpm++ or unipc", optional=True),
    ServedTensor(
        name="guidance_interval",
        dtype="INT32",
        shape=(1,),
        doc="after a fifth of the steps, guidance anew every so many",
        optional=True,
    ),
    ServedTensor(
        name="reuse_interval",
        dtype="INT32",
        shape=(1,),
        doc="after a fifth of the steps, the whole network every so many; exported with --feature-reuse",
        optional=True,
    ),
    ServedTensor(name="eta", dtype="FP32", shape=(1,), doc="0: deterministic, 1: as DDPM", optional=True),
    ServedTensor(name="seed", dtype="UINT64", shape=(1,), doc="of the noise of eta and of no inversion", optional=True),
    ServedTensor(name="inversion", dtype="BOOL", shape=(1,), doc="start from the inverted source", optional=True),
    ServedTensor(
        name="inversion_steps", dtype="INT32", shape=(1,), doc="absent: those kept with the clip", optional=True
    ),
    ServedTensor(
        name="inversion_iterations",
        dtype="INT32",
        shape=(1,),
        doc="refinements of each step; absent: as kept with the clip",
        optional=True,
    ),
    ServedTensor(
        name="keep", dtype="STRING", shape=(1,), doc="background or motion: of the source, as it is", optional=True
    ),
    ServedTensor(
        name="source_prompt",
        dtype="STRING",
        shape=(1,),
        doc="what the source shows; absent: its caption",
        optional=True,
    ),
    ServedTensor(
        name="replace_cross",
        dtype="FP32",
        shape=(1,),
        doc="share of the steps with the source's attention to words",
        optional=True,
    ),
    ServedTensor(
        name="replace_self",
        dtype="FP32",
        shape=(1,),
        doc="share of the steps with the source's attention to frames",
        optional=True,
    ),
    ServedTensor(
        name="blend_words", dtype="STRING", shape=(-1,), doc="outside of what they show the source stays", optional=True
    ),
    ServedTensor(name="word_weights", dtype="STRING", shape=(-1,), doc="word:weight, of words to draw", optional=True),
    ServedTensor(
        name="direct_inversion",
        dtype="BOOL",
        shape=(1,),
        doc="the source goes back on its inverted trajectory at every step",
        optional=True,
    ),
    ServedTensor(
        name="control", dtype="STRING", shape=(-1,), doc="networks of the clip's base that follow maps", optional=True
    ),
    ServedTensor(
        name="control_video",
        dtype="STRING",
        shape=(-1,),
        doc="the maps: a video file for each control, of the source's frames, the clip's size",
        optional=True,
    ),
    ServedTensor(
        name="control_scale", dtype="FP32", shape=(-1,), doc="how far each is followed; absent: 1", optional=True
    ),
    ServedTensor(
        name="control_start", dtype="FP32", shape=(-1,), doc="share of the steps before each; absent: 0", optional=True
    ),
    ServedTensor(
        name="control_end", dtype="FP32", shape=(-1,), doc="share of the steps to its end; absent: 1", optional=True
    ),
    ServedTensor(
        name="control_inversion", dtype="BOOL", shape=(1,), doc="true: the source is inverted with them", optional=True
    ),
    ServedTensor(
        name="video", dtype="STRING", shape=(1,), doc="a video file to edit in the clip's place", optional=True
    ),
    ServedTensor(
        name="source_frames",
        dtype="UINT8",
        shape=(-1, -1, -1, 3),
        doc="(f, H, W, 3) RGB to edit in the clip's place",
        optional=True,
    ),
    ServedTensor(
        name="mask",
        dtype="STRING",
        shape=(1,),
        doc="a video file of 1 frame, or of as many as the source: white where the picture may change",
        optional=True,
    ),
    ServedTensor(
        name="preview_interval", dtype="INT32", shape=(1,), doc="a preview every so many steps; 0: none", optional=True
    ),
    ServedTensor(name="output", dtype="STRING", shape=(1,), doc="frames or mp4", optional=True),
    ServedTensor(
        name="fps", dtype="FP32", shape=(1,), doc="of the result; absent: the clip's, with its sound", optional=True
    ),
    ServedTensor(
        name="prompt_metadata",
        dtype="BOOL",
        shape=(1,),
        doc="true: the metadata names the prompts",
        optional=True,
    ),
)
"""The names of settings are those of EditConfig, and so are the defaults of what is absent; the rest is Request's."""
CONTROL_INPUTS = tuple(tensor.name for tensor in STREAM_INPUTS if tensor.name.partition("_")[0] == "control")
"""Those that tell of maps to follow."""
UNARY_INPUTS = tuple(tensor for tensor in STREAM_INPUTS if tensor.name != "preview_interval")
STREAM_OUTPUTS = (
    ServedTensor(name="stage", dtype="STRING", shape=(1,), doc="invert, sample, render or done"),
    ServedTensor(name="step", dtype="INT32", shape=(1,), doc="steps done in this stage"),
    ServedTensor(name="steps", dtype="INT32", shape=(1,), doc="steps of this stage"),
    ServedTensor(
        name="preview",
        dtype="UINT8",
        shape=(-1, -1, -1, -1, 3),
        doc="(prompts, f, h, w, 3) RGB at the latents' size; black where a prompt's turn has not come",
    ),
    ServedTensor(
        name="frames",
        dtype="UINT8",
        shape=(-1, -1, -1, -1, 3),
        doc="(prompts, f, H, W, 3) RGB: all, or with the stage render the next ones",
    ),
    ServedTensor(name="video", dtype="STRING", shape=(-1,), doc="an MP4 file of each prompt"),
    ServedTensor(name="fps", dtype="FP32", shape=(1,), doc="frames a second of the clip"),
    ServedTensor(
        name="metadata",
        dtype="STRING",
        shape=(-1,),
        doc="each edit's settings, as JSON; an MP4's comment",
    ),
    ServedTensor(name="error", dtype="STRING", shape=(2,), doc="gRPC status and message of a failed edit"),
    ServedTensor(name="request_id", dtype="STRING", shape=(1,), doc="the request's id, or the one that it was given"),
)
"""Every response of the stream has `request_id` and the first three; `preview` comes with some steps; the last response
has `fps`, `metadata`, and either `frames` or `video`. Frames beyond WorkerConfig.response_mib come before it: responses
of the stage `render` have the next ones, `step` counts those that are there, the last one has none. That of a failed
edit has `error` in their place: a response like others, since errors that bear a gRPC status on a stream (the header
`triton_grpc_error`) crash Triton 2.51 now and then."""
UNARY_OUTPUTS = tuple(
    tensor for tensor in STREAM_OUTPUTS if tensor.name in ("frames", "video", "fps", "metadata", "request_id")
)
CLIPS_INPUTS = (
    ServedTensor(name="clip", dtype="STRING", shape=(1,), doc="name of an exported clip; absent: all", optional=True),
)
CLIPS_OUTPUTS = (
    ServedTensor(name="clip", dtype="STRING", shape=(-1,), doc="names of the clips that the others tell of"),
    ServedTensor(name="frames", dtype="INT32", shape=(-1,), doc="of the clip; a source may have others"),
    ServedTensor(name="height", dtype="INT32", shape=(-1,), doc="of the frames"),
    ServedTensor(name="width", dtype="INT32", shape=(-1,), doc="of the frames"),
    ServedTensor(name="fps", dtype="FP32", shape=(-1,), doc="frames a second of the clip"),
    ServedTensor(name="prompt", dtype="STRING", shape=(-1,), doc="the caption that it was tuned on"),
    ServedTensor(name="inversion_steps", dtype="INT32", shape=(-1,), doc="of the inversion kept with it"),
)
"""After the first the names are those of ServedClip and of ClipInfo."""

STARTED_ANEW = "started anew"
"""Words of every refusal by a gateway behind which no server is, for the moment."""
_OF_THE_QUEUE = re.compile(r"exceeds maximum queue size|request timeout expired", re.IGNORECASE)

MAX_PROMPTS = 8
WORDS = ("blend_words", "word_weights")
"""Settings of several texts."""
MAX_WORDS = 64
MAX_CONTROLS = MAX_PROMPTS
_OF_CONTROLS = ("scale", "start", "end")
"""Numbers of each control, on the wire with `control_` before them."""
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


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """What is known of a tuned clip beside its tensors: kept in a checkpoint and in an exported clip."""

    base: str
    """Path or hub id of the image model."""
    base_hash: str
    """Of all that it holds, and of what was added to it."""
    prompt: str
    frames: int
    height: int
    width: int
    fps: float
    inversion_steps: int
    edit: Mapping[str, Any] = field(default_factory=dict)
    """Of EDIT_DEFAULTS, those that the clip was tuned to be edited with."""
    inversion_iterations: int = InversionConfig.iterations
    additions: Mapping[str, Any] = field(default_factory=dict)
    """What was added to the image model, as config.Additions has it."""
    window: int | None = None
    """Frames that the network takes at once, where those are fewer than the clip has."""
    source_height: int | None = None
    """At which the source is shown, of which the frames were fitted; None where nobody kept that."""
    source_width: int | None = None
    fit: Literal["crop", "squash"] = ClipConfig.fit
    """How they were: cropped or squashed."""
    version: int = VERSION

    @property
    def network_frames(self) -> int:
        """Frames that the network takes at once; a source has at least so many."""
        return self.window or self.frames

    @property
    def exported_base(self) -> str:
        """The folder of the graphs that serve this clip, and every other one of its base, window and size."""
        return f"{self.base_hash[:16]}-{self.network_frames}x{self.height}x{self.width}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def inversion(self) -> InversionConfig:
        """Of the latents that are kept with it."""
        return InversionConfig(steps=self.inversion_steps, iterations=self.inversion_iterations)

    def inversion_of(self, edit: EditConfig) -> InversionConfig:
        """Of an edit's start: the clip's own where the edit asks for no other."""
        asked: dict[str, Any] = {"steps": edit.inversion_steps, "iterations": edit.inversion_iterations}
        if edit.filled().direct_inversion:  # step by step beside the edit
            asked |= {"steps": edit.steps, "trajectory": True}
        return replace(self.inversion, **{name: value for name, value in asked.items() if value is not None})

    @classmethod
    def from_json(cls, value: Any) -> ClipInfo:
        """Raises InputError for another version or missing entries."""
        if not isinstance(value, dict):
            raise InputError(f"clip: its description is {type(value).__name__}, not a JSON object")
        if value.get("version") != VERSION:
            raise InputError(f"clip: version {value.get('version')!r} is not {VERSION}; export or tune it again")
        # Clips of before have none of these.
        value = {"edit": {}, "additions": {}, "inversion_iterations": 0, "window": None} | value
        value = {"source_height": None, "source_width": None, "fit": ClipConfig.fit} | value
        if missing := [f.name for f in fields(cls) if f.name not in value]:
            raise InputError(f"clip: its description lacks {', '.join(missing)}")
        from tav_opt import schemas  # not for clients, who read no such file

        schemas.check(schemas.ClipDescription, value, "clip")
        _check_edit_defaults(value["edit"])
        if value["window"] is not None and value["window"] >= value["frames"]:
            raise InputError(f"clip: its window {value['window']} is not below its {value['frames']} frames")
        return cls(**{f.name: value[f.name] for f in fields(cls)})

    def edited(self, config: E, given: Collection[str] = (), preset: Preset = "exact") -> E:
        """The settings of an edit, in which the preset's, or else the clip's, stand for those that were not given."""
        found = {**self.edit, **PRESETS[preset]}
        return replace(config, **{name: value for name, value in found.items() if name not in given})


def _check_edit_defaults(found: Any) -> None:
    kinds: dict[str, Any] = {"steps": int, "guidance_scale": (int, float), "inversion": bool}
    if not isinstance(found, dict) or not all(
        isinstance(value, kinds.get(name, ())) and isinstance(value, bool) == (name == "inversion")
        for name, value in found.items()
    ):
        raise InputError(f"clip: its edit settings {found!r} are not of {', '.join(EDIT_DEFAULTS)}")
    check_numbers(EditConfig(**found))


def edit_metadata(
    info: ClipInfo,
    clip: str,
    config: EditConfig,
    prompts: Sequence[str],
    *,
    engine: EngineName,
    masked: bool = False,
    with_prompts: bool = False,
) -> dict[str, Any]:
    """What a written edit of the clip so named says of itself: where it is from and how to make it again.

    A model in a folder is named without the folders above it, which are nobody's business; its hash tells which it is.
    """
    found = {
        "software": f"tav-opt {__version__}",
        "model": PurePath(info.base).name if PurePath(info.base).is_absolute() else info.base,
        "model_hash": info.base_hash,
        "clip": clip,
        "engine": engine,
        "steps": config.steps,
        "guidance_scale": round(config.guidance_scale, 6),  # float32 on the wire
        "guidance_interval": config.guidance_interval,
        "reuse_interval": config.reuse_interval,
        "solver": config.solver,
        "eta": round(config.eta, 6),
        "seed": config.seed,
        "inversion": config.inversion,
        "inversion_steps": info.inversion_of(config).steps,
        "inversion_iterations": info.inversion_of(config).iterations,
        "masked": masked,
    }
    texts: dict[str, Any] = {"prompts": list(prompts), "negative_prompt": config.negative_prompt}
    if config.controlled:
        filled = config.filled()
        found |= {name: getattr(filled, name) for name in ("keep", "direct_inversion")}
        found |= {name: round(getattr(filled, name), 6) for name in ("replace_cross", "replace_self")}
        texts["source_prompt"] = info.prompt if config.source_prompt is None else config.source_prompt
        texts |= {name: list(getattr(config, name)) for name in WORDS}
    if config.controls:
        numbers = [{name: round(getattr(one, name), 6) for name in _OF_CONTROLS} for one in config.controls]
        found["controls"] = [{"name": one.name} | told for one, told in zip(config.controls, numbers, strict=True)]
    return found | (texts if with_prompts else {})


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
    numbers = {name: [getattr(one, name) for one in config.controls] for name in _OF_CONTROLS}
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
    told = {name: values.pop(f"control_{name}") for name in ("video", *_OF_CONTROLS) if f"control_{name}" in values}
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
