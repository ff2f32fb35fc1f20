"""Files that the page takes beside words: a mask, and maps to follow; what of them reaches an edit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded import lossless, pictures
from exported import FRAMES, SIDE, Exported, export_once
from PIL import Image

from tav_opt import video
from tav_opt.config import CONTROL_SETTINGS, InputError
from tav_opt.contract import Request, from_tensors

pytest.importorskip("gradio", reason="Gradio is not installed (extra app)")

import gradio as gr

from tav_opt.app import edit_history
from tav_opt.app.app_config import AppConfig
from tav_opt.app.backends import InProcess
from tav_opt.app.clip_source import ClipSources
from tav_opt.app.edit_tab import EditTab, Rooms
from tav_opt.app.kept_results import KeptResults

ABOUT = {"clip": "first", "negative_prompt": "", "preset": "exact", "files": ""}


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture
def tab(exported: Exported, tmp_path: Path) -> EditTab:
    config = AppConfig(in_process=True, repository=exported.repository)
    rooms = Rooms(
        config=config,
        backend=InProcess(config),
        sources=ClipSources(config.repository, tmp_path / "sources"),
        results=KeptResults(tmp_path / "results", 1000),
    )
    with gr.Blocks():
        return EditTab(rooms)


def asked(tab: EditTab, *, fitting: dict[str, str] | None = None, **guides: Any) -> Any:
    """What the page sends for such drawers; what is not named is empty."""
    shown = [(fitting or {}).get(one.name, "") for one in tab.fitting]
    shown += [guides.get("mask"), guides.get("maps")]
    shown += [guides.get(one.name, "") for one in (*tab.guides.settings, *tab.settings)]
    return tab._asked("first", None, "a panda", "", "exact", shown)


def test_a_mask_and_maps_reach_the_edit_as_they_are(tab, tmp_path, monkeypatch):
    maps = {name: pictures(FRAMES, SIDE, SIDE, seed) for seed, name in enumerate(("canny", "depth"))}
    for name, frames in maps.items():
        (tmp_path / f"{name}.mkv").write_bytes(lossless(frames))
    white = np.zeros((SIDE, SIDE), np.uint8)
    white[:, SIDE // 2 :] = 255
    Image.fromarray(white).save(tmp_path / "right.png")
    paths = [str(tmp_path / f"{name}.mkv") for name in maps]
    given = {"control_scale": "0.5", "control_start": "0, 0.25", "control_inversion": "on"}
    found = asked(tab, mask=str(tmp_path / "right.png"), maps=paths, **given)
    assert found.files == "right.png, canny.mkv, depth.mkv"
    told: list[Request] = []
    done = {"metadata": [], "frames": np.zeros((0, FRAMES, SIDE, SIDE, 3), np.uint8)}
    monkeypatch.setattr(tab.rooms.backend, "_answer", lambda tensors, *_: told.append(from_tensors(tensors)) or done)
    tab.rooms.backend.begin(found.clip, found.edit, found.options).result()
    (request,) = told
    assert [(one.name, one.scale, one.start, one.end) for one in request.edit.controls] == [
        ("canny", 0.5, 0, 1), ("depth", 0.5, 0.25, 1),
    ]  # fmt: skip
    assert request.edit.control_inversion
    for data, frames in zip(request.control_videos, maps.values(), strict=True):
        np.testing.assert_array_equal(video.decode(data).frames, frames)
    assert request.mask is not None
    np.testing.assert_array_equal(video.decode(request.mask).frames[0, ..., 0], white)


def test_each_drawer_has_its_own_settings(tab):
    found = asked(tab, keep="motion", replace_self="0.7", word_weights="panda:2\nbeach:0.5", steps="3", fps="12")
    edit = found.edit
    assert (edit.keep, edit.replace_self, edit.word_weights) == ("motion", 0.7, ("panda:2", "beach:0.5"))
    assert (edit.steps, found.options["fps"], edit.controls) == (3, 12, ())
    assert {one.name for one in tab.keeping} == set(CONTROL_SETTINGS)
    history = [edit_history.entry("k/1", "a panda", 1.0, settings=found.given, **ABOUT)]
    restored = tab.restored(["k/1"], json.loads(json.dumps(history)))
    again = [restored[one] for one in tab._drawers]
    shown = [*again[: len(tab.fitting)], None, None, *again[len(tab.fitting) :]]
    assert tab._asked("first", None, "a panda", "", "exact", shown).edit == edit


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"control_scale": "0.5"}, "control scale is of maps to follow: there are none"),
        (
            {"maps": ["canny.mkv"], "control_end": "0.5, 1"},
            "control end 0.5, 1.0: must be one for all, or 1, one a map",
        ),
        ({"maps": ["a/canny.mkv", "b/canny.mp4"]}, "canny.mp4: there are maps for 'canny' already"),
        ({"maps": ["nowhere/canny.mkv"]}, "canny.mkv does not exist"),
        ({"fitting": {"stride": "2"}}, "stride is of another video in the clip's place: there is none"),
    ],
)
def test_what_belongs_to_no_file_is_refused(tab, given, words):
    with pytest.raises(InputError, match=re.escape(words)):
        asked(tab, **given)
