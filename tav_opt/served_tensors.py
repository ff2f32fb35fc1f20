"""Names, dtypes and shapes of every served tensor. Declared here, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

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

WORDS = ("blend_words", "word_weights")
"""Settings of several texts."""
OF_CONTROLS = ("scale", "start", "end")
"""Numbers of each control, on the wire with `control_` before them."""
