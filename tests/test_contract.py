"""Requests as tensors and back, and what is refused on the way."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tav_opt.config import Control, EditConfig, InputError
from tav_opt.contract import (
    MAX_VIDEO_BYTES,
    STREAM_INPUTS,
    UNARY_INPUTS,
    ClipInfo,
    Request,
    check_clip_name,
    from_tensors,
    to_tensors,
)

TEXT = st.text(max_size=80).filter(lambda text: "\x00" not in text)
INFO = ClipInfo(
    base="sd", base_hash="0123456789abcdef" * 4, prompt="x", frames=4, height=64, width=96, fps=8, inversion_steps=4
)


@given(
    clip=TEXT,
    config=st.builds(
        EditConfig,
        prompts=st.lists(TEXT, min_size=1, max_size=8).map(tuple),
        negative_prompt=TEXT,
        steps=st.integers(0, 2**31 - 1),
        guidance_scale=st.floats(width=32, allow_nan=False),
        eta=st.floats(width=32, allow_nan=False),
        seed=st.integers(0, 2**64 - 1),
        inversion=st.booleans(),
        inversion_steps=st.integers(0, 2**31 - 1),
        inversion_iterations=st.integers(0, 2**31 - 1),
        solver=TEXT,
        guidance_interval=st.integers(0, 2**31 - 1),
        reuse_interval=st.integers(0, 2**31 - 1),
        keep=st.none() | TEXT,
        source_prompt=st.none() | TEXT,
        replace_cross=st.none() | st.floats(width=32, allow_nan=False),
        replace_self=st.none() | st.floats(width=32, allow_nan=False),
        blend_words=st.lists(TEXT, max_size=8).map(tuple),
        word_weights=st.lists(TEXT, max_size=8).map(tuple),
        direct_inversion=st.none() | st.booleans(),
    ),
)
def test_a_request_survives_the_wire(clip, config):
    request = from_tensors(to_tensors(clip, config))
    assert (request.clip, request.edit) == (clip, config)
    assert (request.video, request.source_frames, request.preview_interval, request.output) == (None, None, 0, "frames")


def test_sources_previews_and_output_survive_the_wire():
    config, frames = EditConfig(prompts=("x",)), np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    request = from_tensors(to_tensors("toy", config, source_frames=frames, preview_interval=3, output="mp4"))
    assert np.array_equal(request.source_frames, frames)
    assert (request.preview_interval, request.output, request.video) == (3, "mp4", None)
    assert from_tensors(to_tensors("toy", config, video=b"\xff\x00")).video == b"\xff\x00"
    assert from_tensors(to_tensors("toy", config, mask=b"\xff\x00")).mask == b"\xff\x00"


def test_controls_survive_the_wire():
    controls = (Control(name="pose", scale=0.5), Control(name="depth", start=0.25, end=0.5))
    config = EditConfig(prompts=("x",), controls=controls, control_inversion=True)
    request = from_tensors(to_tensors("toy", config, control_videos=[b"\xff", b"b"]))
    assert (request.edit, request.control_videos) == (config, (b"\xff", b"b"))
    usual = to_tensors("toy", EditConfig(prompts=("x",), controls=(Control(name="pose"),)), control_videos=[b"a"])
    assert {name for name in usual if name.startswith("control")} == {"control", "control_video"}
    assert not [name for name in to_tensors("toy", EditConfig(prompts=("x",))) if name.startswith("control")]
    with pytest.raises(InputError, match="1 videos of maps for 2 controls"):
        to_tensors("toy", config, control_videos=[b"a"])


def test_every_setting_of_a_request_is_served():
    names = {t.name for t in STREAM_INPUTS}
    of_controls = {"control", "control_video", *(f"control_{f.name}" for f in fields(Control) if f.name != "name")}
    assert of_controls <= names
    assert names - of_controls - {"prompt"} == (
        {f.name for f in fields(EditConfig)} | {f.name for f in fields(Request)}
    ) - {
        "prompts",
        "edit",
        "given",
        "controls",
        "control_videos",
    }
    assert names - {t.name for t in UNARY_INPUTS} == {"preview_interval"}


def test_what_is_absent_has_the_defaults_of_editing():
    few = {name: to_tensors("toy", EditConfig(prompts=("a", "b")))[name] for name in ("clip", "prompt")}
    request = from_tensors(few)
    assert (request.clip, request.edit) == ("toy", EditConfig(prompts=("a", "b")))
    assert (request.preview_interval, request.output) == (Request.preview_interval, Request.output)


def text(*items: bytes) -> np.ndarray:
    return np.array(items, dtype=object)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip": None}, "'clip' is missing"),
        ({"prompt": None}, "'prompt' is missing"),
        ({"prompt": text()}, "0 prompts"),
        ({"prompt": text(*[b"x"] * 9)}, "9 prompts: 1…8"),
        ({"prompt": text(b"\xff\xfe")}, "prompt is not UTF-8"),
        ({"prompt": text(b"x" * 5000)}, "5000 bytes"),
        ({"prompt": np.array([[b"x"]], object)}, r"prompt has shape \[1, 1\]"),
        ({"prompt": np.array([1.0])}, "prompt is float64, not STRING"),
        ({"steps": np.array([4], np.int64)}, "steps is int64, not INT32"),
        ({"steps": np.array([4, 4], np.int32)}, r"steps has shape \[2\], not \[1\]"),
        ({"frobnicate": np.array([1])}, "'frobnicate' is unknown"),
        ({"output": text(b"gif")}, "output 'gif' is not frames or mp4"),
        ({"preview_interval": np.array([-1], np.int32)}, "preview_interval -1"),
        ({"video": text(b"a" * (MAX_VIDEO_BYTES + 1))}, "video has 67108865 bytes"),
        ({"mask": text(b"a" * (MAX_VIDEO_BYTES + 1))}, "mask has 67108865 bytes"),
        (
            {"source_frames": np.zeros((2, 4, 3), np.uint8)},
            r"source_frames has shape \[2, 4, 3\], not \[-1, -1, -1, 3\]",
        ),
        ({"source_frames": np.zeros((2, 4, 4, 4), np.uint8)}, r"not \[-1, -1, -1, 3\]"),
        ({"source_frames": np.zeros((2, 4, 4, 3), np.uint8), "video": text(b"a")}, "video and source_frames: give one"),
        ({"video": text(b"a"), "inversion": np.array([False])}, "video without inversion"),
        ({"control": text()}, "0 controls: 1…8"),
        ({"control": text(b"pose")}, "control_video has 0 entries for 1 controls"),
        ({"control_scale": np.array([1], np.float32)}, "0 controls"),
        ({"control": text(b"Pose"), "control_video": text(b"a")}, "is not 1…63"),
        (
            {"control": text(b"a"), "control_video": text(b"a"), "control_end": np.ones(2, np.float32)},
            "control_end has 2 entries for 1 controls",
        ),
    ],
)
def test_malformed_requests_are_refused(change, words):
    tensors = {"clip": text(b"toy"), "prompt": text(b"x"), **change}
    with pytest.raises(InputError, match=words):
        from_tensors({name: array for name, array in tensors.items() if array is not None})


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="steps 1099511627776 does not fit INT32"):
        to_tensors("toy", EditConfig(prompts=("x",), steps=2**40))


@pytest.mark.parametrize("name", ["", "A", "a/b", "../a", "a b", "-a", "a" * 64, "a\n", "ä"])
def test_clip_names_cannot_be_paths(name):
    with pytest.raises(InputError, match="is not 1…63"):
        check_clip_name(name)


def test_clip_info_survives_json_and_refuses_others():
    value = json.loads(json.dumps(INFO.to_json()))
    assert ClipInfo.from_json(value) == INFO
    assert INFO.exported_base == "0123456789abcdef-4x64x96"
    with pytest.raises(InputError, match="version 99"):
        ClipInfo.from_json({**value, "version": 99})
    del value["fps"]
    with pytest.raises(InputError, match="lacks fps"):
        ClipInfo.from_json(value)
