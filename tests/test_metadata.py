"""What written edits say of themselves, as other programs read it: FFmpeg's tags, Pillow's text."""

from __future__ import annotations

import io
import json

import av
import numpy as np
import pytest
from encoded import comments

from tav_opt import __version__, video
from tav_opt.config import Control, EditConfig
from tav_opt.contract import ClipInfo, edit_metadata

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
METADATA = {"model": "tiny", "seed": 7, "prompts": ["ein Löwe, 狮子 🦁", 'a "quoted" \\ cat\nof two lines']}


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_metadata_is_read_by_others_and_changes_no_picture(name, tmp_path):
    video.write(tmp_path / f"with-{name}", FRAMES, 8, METADATA)
    assert comments(tmp_path / f"with-{name}") == [METADATA] * (3 if name == "clip" else 1)
    video.write(tmp_path / name, FRAMES, 8)
    with_it, without = video.read(tmp_path / f"with-{name}"), video.read(tmp_path / name)
    assert np.array_equal(with_it.frames, without.frames) and with_it.fps == without.fps
    with pytest.raises(KeyError):
        comments(tmp_path / name)


@pytest.mark.parametrize("length", [254, 255, 256, 510, 511, 5000])
def test_comments_of_any_length_leave_a_gif_whole(length, tmp_path):
    filler = "x" * (length - len(json.dumps({"a": ""})))
    video.write(tmp_path / "clip.gif", FRAMES, 8, {"a": filler})
    assert comments(tmp_path / "clip.gif") == [{"a": filler}]
    with av.open(str(tmp_path / "clip.gif")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3


def test_an_mp4_with_metadata_still_plays_while_it_loads():
    data = video.encode_mp4(FRAMES, 8, METADATA)
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(io.BytesIO(data)) as container:
        assert json.loads(container.metadata["comment"]) == METADATA


INFO = ClipInfo(
    base="/home/someone/models/tiny", base_hash="ab" * 32, prompt="a dog", frames=3, height=64, width=64, fps=8,
    inversion_steps=50,
)  # fmt: skip
KEYS = [
    "software",
    "model",
    "model_hash",
    "clip",
    "engine",
    "steps",
    "guidance_scale",
    "guidance_interval",
    "reuse_interval",
    "solver",
    "eta",
    "seed",
    "inversion",
    "inversion_steps",
    "inversion_iterations",
    "masked",
]


def test_keys_stay_as_they_are_and_name_no_folder_of_the_user():
    config = EditConfig(prompts=("a cat",), guidance_scale=float(np.float32(7.3)), negative_prompt="blur")
    found = edit_metadata(INFO, "toy", config, config.prompts, engine="compiled", with_prompts=True)
    assert list(found) == [*KEYS, "prompts", "negative_prompt"]
    assert (found["software"], found["model"], found["clip"]) == (f"tav-opt {__version__}", "tiny", "toy")
    assert (found["guidance_scale"], found["prompts"], found["inversion_steps"]) == (7.3, ["a cat"], 50)
    assert list(edit_metadata(INFO, "toy", config, config.prompts, engine="compiled")) == KEYS


def test_attention_control_is_told_where_there_is_some():
    config = EditConfig(prompts=("a cat",), keep="background", word_weights=("cat:2",), replace_self=0.3)
    found = edit_metadata(INFO, "toy", config, config.prompts, engine="compiled", with_prompts=True)
    control = {name: found[name] for name in list(found)[len(KEYS) :]}
    assert control == {
        "keep": "background",
        "direct_inversion": True,
        "replace_cross": config.filled().replace_cross,
        "replace_self": 0.3,
        "prompts": ["a cat"],
        "negative_prompt": "",
        "source_prompt": "a dog",
        "blend_words": [],
        "word_weights": ["cat:2"],
    }
    assert found["inversion_steps"] == config.steps
    without = edit_metadata(INFO, "toy", config, config.prompts, engine="compiled")
    assert list(without) == [*KEYS, "keep", "direct_inversion", "replace_cross", "replace_self"]


def test_what_is_followed_is_told():
    config = EditConfig(prompts=("a cat",), controls=(Control(name="pose", scale=float(np.float32(0.7))),))
    found = edit_metadata(INFO, "toy", config, config.prompts, engine="compiled")
    assert list(found) == [*KEYS, "controls", "control_inversion"] and not found["control_inversion"]
    assert found["controls"] == [{"name": "pose", "scale": 0.7, "start": 0.0, "end": 1.0}]
