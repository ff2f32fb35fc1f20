"""Public benchmarks' manifests, read as they are published, and TGVE's layout of results."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from suites import FRAMES, SIDE, ended, evaluate, random_video, settings, written

from tav_opt.config import ClipConfig, InputError
from tav_opt.suite import tgve
from tav_opt.suite.manifests import READERS, read


def clip_at(path: Path) -> ClipConfig:
    return ClipConfig(video=path)


def test_tgve_as_one_table(shared: Path) -> None:
    found = read("tgve", shared / "suites" / "tgve.csv", Path("data"), None, clip_at)
    assert len(found) == 76 and sum(len(video.edits) for video in found) == 304
    first = found[0]
    assert first.clip.video == Path("data/DAVIS_480p/480p_frames/bmx-rider") and first.source == "davis"
    categories = [(edit.name, edit.category) for edit in first.edits]
    assert categories == [
        ("style", "style"),
        ("object", "subject"),
        ("background", "background"),
        ("multiple", "mixed"),
    ]


HEADING = [
    "Video name",
    "Our GT caption",
    "Style Change Caption",
    "Object Change Caption",
    "Background Change Caption",
    "Multiple Changes Caption",
]


def as_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_tgve_as_it_is_published(tmp_path: Path) -> None:
    file = as_csv(
        tmp_path / "own.csv",
        [
            [*HEADING, ""],
            ["DAVIS Videos:", *[""] * 6],
            ["bear ", "a bear", "a bear, ink", "a cow", "a bear on ice", "a cow on ice, ink", ""],
            [""] * 7,
            ["Youtube Videos:", *[""] * 6],
            ["cars", "cars", "cars, ink", "buses", "cars on ice", "buses on ice, ink", ""],
        ],
    )
    bear, cars = read("tgve", file, tmp_path, None, clip_at)
    assert (bear.name, bear.source, cars.source, bear.edits[1].prompt) == ("bear", "davis", "youtube", "a cow")
    assert cars.clip.video == tmp_path / "youtube_480p/480p_frames/cars"
    as_csv(tmp_path / "own.csv", [HEADING, ["bear", *["x"] * 5]])
    with pytest.raises(InputError, match="row 2: 'bear' stands before a row such as 'DAVIS Videos:'"):
        read("tgve", file, tmp_path, None, clip_at)


def test_results_in_tgves_layout(tmp_path: Path) -> None:
    frames = np.full((2, 64, 64, 3), (200, 40, 90), np.uint8)
    out = tgve.write_result(tmp_path, "videvo", "cars", "multiple", frames)
    assert out == tmp_path / "videvo_480p" / "cars" / "multiple"
    assert [path.name for path in sorted(out.iterdir())] == ["00000.jpg", "00001.jpg"]
    picture = np.asarray(Image.open(out / "00000.jpg"))
    assert picture.shape == (480, 480, 3) and abs(picture.astype(int) - (200, 40, 90)).max() < 4
    tgve.write_result(tmp_path, "videvo", "cars", "multiple", frames[:1] // 2)
    (again,) = out.iterdir()
    assert abs(np.asarray(Image.open(again)).astype(int) - (100, 20, 45)).max() < 4, "the newer result"


def test_v2vbench_editboard_five_and_davis(tmp_path: Path) -> None:
    (tmp_path / "hike").mkdir()
    v2v = written(tmp_path, {"data": [{"video_id": "hike", "edit": [{"prompt": "a"}, {"prompt": "b"}]}]}, "v2v.yaml")
    (hike,) = read("v2vbench", v2v, tmp_path, None, clip_at)
    assert ([e.name for e in hike.edits], hike.caption, hike.clip.video) == (["0", "1"], None, tmp_path / "hike")

    columns = ["original_video_path", "edited_video_path", "semantic_mask_path", "source_prompt", "target_prompt"]
    rows = [["./sample/bear", f"./sample/bear_{n}", "./sample/bear_mask", "a bear", f"a {n} bear"] for n in "ab"]
    (bear,) = read("editboard", as_csv(tmp_path / "s.csv", [columns, *rows]), tmp_path, None, clip_at)
    assert [edit.name for edit in bear.edits] == ["bear_a", "bear_b"] and bear.mask == tmp_path / "sample/bear_mask"

    for column, other, words in (
        (0, "./other/bear", "two paths"),
        (2, "./sample/bear_mask_2", "two masks"),
        (3, "a brown bear", "two source prompts"),
    ):
        changed = [rows[0], [other if index == column else cell for index, cell in enumerate(rows[1])]]
        with pytest.raises(InputError, match=f"bear has {words}: .*{Path(other).name}"):
            read("editboard", as_csv(tmp_path / "s.csv", [columns, *changed]), tmp_path, None, clip_at)

    prompts = tmp_path / "edit_prompt"
    prompts.mkdir()
    for number in (1, 3):
        told = {"video_name": "0001_bus", "source_prompt": "a bus", "target_prompt": f"edit {number}", "more": 1}
        (prompts / f"edit{number}_FiVE.json").write_text(json.dumps([told]))
    (bus,) = read("five", prompts, tmp_path / "videos", tmp_path / "bmasks", clip_at)
    assert [(e.name, e.category) for e in bus.edits] == [("edit1", "subject"), ("edit3", "other")]
    assert bus.mask == tmp_path / "bmasks/0001_bus" and bus.clip.video == tmp_path / "videos/0001_bus.mp4"

    rows = [["bear", "a bear", "a cow", "subject"], ["bear", "", "a bear, ink", "style"]]
    file = as_csv(tmp_path / "davis.csv", [["video", "caption", "prompt", "category"], *rows])
    (davis,) = read("davis", file, tmp_path / "480p", tmp_path / "masks", clip_at)
    assert [e.name for e in davis.edits] == ["subject", "style"] and davis.caption == "a bear"


@pytest.mark.parametrize("kind", READERS)
def test_a_manifest_of_another_form_is_one_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / ("edit1_FiVE.json" if kind == "five" else "manifest")
    for content in ("{}", "[]", "a,b\n1,2\n", "data: [5]"):
        file.write_text(content)
        with pytest.raises(InputError, match=file.name) as caught:
            read(kind, file, tmp_path, None, clip_at)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="absent"):
        read(kind, tmp_path / "edit1_absent", tmp_path, None, clip_at)


def test_tgves_edits_are_measured_and_written_in_its_layout(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command, with its data as published: folders of frames, four edits of each video."""
    row = ["bear", "a bear", "a bear, ink", "a cow", "a bear on ice", "a cow on ice, ink"]
    as_csv(tmp_path / "own.csv", [HEADING, ["DAVIS Videos:", *[""] * 5], row])
    frames = tmp_path / "data" / "DAVIS_480p" / "480p_frames" / "bear"
    frames.mkdir(parents=True)
    for number in range(FRAMES):
        picture = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(picture).save(frames / f"{number:05d}.jpg")
    (tmp_path / "done" / "bear").mkdir(parents=True)
    for seed, name in enumerate(tgve.CATEGORIES):
        random_video(tmp_path / "done" / "bear" / f"{name}.mp4", FRAMES, seed=seed)
    told = settings(golden / "reference_checkpoint" / "sd", methods={"ready": {"folder": "done"}})
    told["clip"] |= {"stride": 1}
    told["manifest"] = {"kind": "tgve", "file": "own.csv", "folder": "data"}
    given = ["--out", tmp_path / "out", "--tgve", tmp_path / "results"]
    status, _, error = evaluate(capsys, written(tmp_path, told), *given)
    assert status == 0 and len(ended(error)) == 1 + 2 * 4, error
    for name in tgve.CATEGORIES:
        written_ = sorted((tmp_path / "results" / "ready" / "DAVIS_480p" / "bear" / name).iterdir())
        assert [path.name for path in written_] == [f"{number:05d}.jpg" for number in range(FRAMES)]
        assert Image.open(written_[0]).size == (480, 480)


def test_the_layout_is_tgves_alone(small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = evaluate(capsys, small(), "--out", tmp_path / "out", "--tgve", tmp_path / "results")
    assert status == 2 and "has no manifest of TGVE" in error and not (tmp_path / "results").exists()
