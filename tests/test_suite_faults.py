"""Suites that go wrong: each fault in one line, before anything long begins, and the other clips done."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from suites import FRAMES, PLACE, ended, entry, evaluate, random_video

from tav_opt.config import InputError
from tav_opt.suite import workshop
from tav_opt.suite.suite_file import read_suite
from tav_opt.suite.unit_store import UnitStore
from tav_opt.suite.units import Place, content, measured_by, units


def test_a_broken_video_is_reported_and_the_others_are_done(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "dog.mp4").read_bytes()[:700])
    path = small(videos=[entry("broken.mp4"), entry("dog.mp4")])
    status, _, error = evaluate(capsys, path, "--out", tmp_path / "out")
    assert status == 1 and "tav-opt evaluate: source broken: " in error and "3 units need what failed" in error
    assert ended(error)[-1] == "measure ours--dog--subject" and "Traceback" not in error
    told = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert list(told["faults"]) == ["source broken"] and len(told["not done for them"]) == 3
    shutil.copyfile(tmp_path / "dog.mp4", tmp_path / "broken.mp4")
    content.cache_clear()
    status, _, error = evaluate(capsys, path, "--out", tmp_path / "out")
    assert status == 0 and len(ended(error)) == 4, "only what was broken"


@pytest.mark.parametrize(
    ("white", "frames", "words"),
    [(False, 2, "need 5; it has 2"), (True, 5, "is white all over"), (False, 0, "holds no images")],
)
def test_a_mask_that_will_not_do_is_said_before_tuning(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], white: bool, frames: int, words: str
) -> None:
    (tmp_path / "mask").mkdir()
    picture = np.full((64, 64), 255 if white else 0, np.uint8)
    for number in range(frames):
        Image.fromarray(picture).save(tmp_path / "mask" / f"{number}.png")
    status, _, error = evaluate(capsys, small(videos=[entry("dog.mp4", mask="mask")]), "--out", tmp_path / "out")
    assert status == 1 and ended(error) == ["source dog"] and words in error and "3 units need what failed" in error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"videos": [entry("absent.mp4")]}, "absent.mp4"),
        ({"colour": 1}, "unknown key colour"),
        ({"videos": [entry("dog.mp4"), entry("other/dog.mp4")]}, "videos: two of the name dog"),
        ({"videos": [entry("dog.mp4", edits=[{"category": "style"}])]}, "dog: edits[1].prompt is missing"),
        ({"methods": {"ours": None, "x": {"folder": "done"}}}, "done/dog/subject"),
        ({"model": "nowhere"}, "model 'nowhere' is neither"),
        ({"metrics": {"clip": "nowhere"}}, "model 'nowhere' is neither"),
        ({"edit": {"negative_prompt": "a blurred panda " * 4}}, "ours: 'a blurred panda"),
        ({"clip": {"frames": FRAMES, "height": 60, "width": 64}}, "dog: size 64×60 is not a multiple of"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_done(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    words: str,
) -> None:
    status, _, error = evaluate(capsys, small(**more), "--out", tmp_path / "out")
    assert status == 2 and words in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("units/*"))


def test_a_full_disk_ends_it_and_leaves_what_was_whole(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workshop, "measure", full)
    path = small(methods={"ready": {"folder": "done"}}, videos=[entry("dog.mp4"), entry("dog.mp4", name="other")])
    for name in ("dog", "other"):
        (tmp_path / "done" / name).mkdir(parents=True)
        random_video(tmp_path / "done" / name / "subject.mp4", FRAMES)
    status, _, error = evaluate(capsys, path, "--out", tmp_path / "out")
    assert status == 2 and "disk full" in error.splitlines()[-1], error
    assert ended(error) == ["source dog", "edit ready--dog--subject"], "nothing that would fail alike is begun"
    assert not list((tmp_path / "out").rglob("metrics.json"))
    monkeypatch.undo()
    status, _, error = evaluate(capsys, path, "--out", tmp_path / "out")
    assert status == 0 and len(ended(error)) == 4, "what was whole is kept"


def test_prompts_that_are_too_long_are_said_before_anything_is_done(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edits = [{"prompt": "a panda " * 9}]
    status, _, error = evaluate(capsys, small(videos=[entry("dog.mp4", edits=edits)]), "--out", tmp_path / "out")
    assert status == 2 and "dog: 'a panda" in error and "tokens long, 16 at most" in error and not ended(error)


def test_nan_in_a_metric_is_a_fault_of_its_unit(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tav_opt.metrics.measuring.warping_error", lambda *_: float("nan"))
    status, _, error = evaluate(capsys, small(), "--out", tmp_path / "out")
    assert status == 1 and "measure ours--dog--subject: warping error is nan" in error


def test_a_finished_video_of_another_length_is_named(
    small: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "done" / "dog").mkdir(parents=True)
    random_video(tmp_path / "done" / "dog" / "subject.mp4", FRAMES + 1)
    status, _, error = evaluate(capsys, small(methods={"x": {"folder": "done"}}), "--out", tmp_path / "out")
    assert status == 1 and f"subject.mp4 has {FRAMES + 1} frames, the clip {FRAMES}" in error


def test_one_folder_has_one_driver(small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with UnitStore(tmp_path / "out").claimed():
        status, _, error = evaluate(capsys, small(), "--out", tmp_path / "out")
    assert status == 2 and "is being evaluated by another process" in error


def test_a_worker_that_would_measure_by_something_else_says_so(small: Any, tmp_path: Path) -> None:
    """As on a node without CLIP, which would take the demo's encoder, or without OpenCV."""
    (tmp_path / "done" / "dog").mkdir(parents=True)
    random_video(tmp_path / "done" / "dog" / "subject.mp4", FRAMES)
    suite = read_suite(small(methods={"x": {"folder": "done"}}))
    found = measured_by(suite.metrics)
    other = replace(suite, measured_by=found | {"cv2": "0.0"})
    here = workshop.Workshop(other, Place(**PLACE), UnitStore(tmp_path / "out"))
    planned = units(other, Place(**PLACE))
    for unit in planned[:2]:
        here.do(unit)
    with pytest.raises(InputError, match=f"would measure by cv2 {found['cv2'] or 'nothing'}, the driver by 0.0"):
        here.do(planned[2])
    assert not UnitStore(tmp_path / "out").done(planned[2])
