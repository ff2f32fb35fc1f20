"""`tav-opt tune --many`: a table of clips becomes checkpoints, which `tav-opt export` takes together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from exported import export_once, other_values
from suites import random_video

from tav_opt import checkpoint, cli, tuning, video
from tav_opt.config import ClipConfig, TrainConfig
from tav_opt.files import read_object

SIZES = ("--frames", "3", "--height", "64", "--width", "64", "--stride", "1")
STEPS = ("--steps", "2", "--inversion-steps", "2", "--save-every", "1", "--device", "cpu")


@pytest.fixture
def model(golden: Path) -> str:
    return str(golden / "reference_checkpoint" / "sd")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two clips, one of its own name and first frame."""
    for seed, name in enumerate(("one", "two")):
        random_video(tmp_path / "clips" / f"{name}.mp4", seed=seed)
    path = tmp_path / "clips" / "clips.csv"
    path.write_text("video,prompt,name,start\none.mp4,a dog,,\ntwo.mp4,a cat,second,2\n")
    return path


def many(table: Path, model: str, *more: str) -> int:
    return cli.main(["tune", "--model", model, "--many", str(table), *SIZES, *STEPS, *more])


def test_each_clip_is_what_tune_makes_of_it_alone(
    table: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert many(table, model, "--out", str(out)) == 0
    said, error = capsys.readouterr()
    assert said.splitlines() == [str(out / "one"), str(out / "second")] and error.count("tune ") == 2, error
    clip = ClipConfig(video=table.parent / "two.mp4", start=2, stride=1, frames=3, height=64, width=64)
    config = TrainConfig(steps=2, inversion_steps=2)
    alone = tuning.tune(model, video.read(clip), "a cat", config, tmp_path / "alone", source=clip)
    found = checkpoint.load(out / "second")
    assert found.info.prompt == "a cat" and found.values.keys() == alone.values.keys()
    assert all((found.values[name] == value).all() for name, value in alone.values.items())
    abouts = [read_object(path) for path in (out / ".many" / "units").glob("tune/*/unit.json")]
    assert sorted(about["model_loaded"] for about in abouts) == [False, True], "the second takes the model in hand"
    assert many(table, model, "--out", str(out)) == 0
    assert "[" not in capsys.readouterr().err, "nothing is done twice"
    before = (out / "one").readlink()
    table.write_text(table.read_text().replace("a dog", "a bus"))
    assert many(table, model, "--out", str(out)) == 0
    assert (out / "one").readlink() != before and checkpoint.load(out / "one").info.prompt == "a bus"


def test_a_broken_clip_is_reported_and_the_others_are_tuned(
    table: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (table.parent / "one.mp4").write_bytes((table.parent / "one.mp4").read_bytes()[:700])
    assert many(table, model, "--out", str(tmp_path / "out")) == 1
    said, error = capsys.readouterr()
    assert said.splitlines() == [str(tmp_path / "out" / "second")] and "tav-opt tune: source one: " in error


@pytest.mark.parametrize(
    ("text", "more", "words"),
    [
        ("video\none.mp4\n", "", "column prompt is missing: there are video"),
        ("video,prompt\n", "", "lists no clips"),
        ("video,prompt,colour\none.mp4,a dog,red\n", "", "column 'colour' is unknown"),
        ("video,prompt\none.mp4,\n", "", "every row needs both"),
        ("video,prompt\none.mp4,a dog\none.mp4,a cat\n", "", "clips: two of the name one"),
        ("video,prompt,name\none.mp4,a dog,a/b\n", "", "name 'a/b' is not 1 to 60"),
        ("video,prompt,frames\none.mp4,a dog,many\n", "", "frames: 'many' is not int"),
        ("video,prompt,frames\none.mp4,a dog,0\n", "", "frames 0 is not within"),
        ("video,prompt\nabsent.mp4,a dog\n", "", "absent.mp4"),
        ("video,prompt\none.mp4,a dog\n", "--prompt x", "--prompt and --video are of one clip"),
        ("video,prompt\none.mp4,a dog\n", "--video x", "--prompt and --video are of one clip"),
        ("video,prompt\none.mp4,a dog\n", "--config x.yaml", "give either --config, of one clip, or --many"),
        ("video,prompt\none.mp4,a dog\n", "--keep-state", "--keep-state does nothing with --many"),
        ("video,prompt\none.mp4,a dog\n", "--warmup 3", "warmup 3"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_done(
    table: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, more: str, words: str
) -> None:
    table.write_text(text)
    assert many(table, model, "--out", str(tmp_path / "out"), *more.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists(), error


def test_a_folder_of_something_else_is_left_alone(
    table: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "second").mkdir(parents=True)
    assert many(table, model, "--out", str(tmp_path / "out")) == 2
    assert "second is there and was made by something else" in capsys.readouterr().err


def test_workers_are_for_many(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["tune", "--model", model, "--prompt", "x", "--video", "absent.mp4", "--out", str(tmp_path / "ckpt")]
    for option in (["--workers", "2"], ["--ray", "auto"]):
        assert cli.main([*given, *option]) == 2
        assert f"{option[0]} is for --many" in capsys.readouterr().err


def test_several_checkpoints_are_exported_at_once(
    golden: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = export_once(golden, tmp_path_factory.getbasetemp())
    shutil.copytree(exported.checkpoint, tmp_path / "units" / "one-0123456789abcdef")
    (tmp_path / "one").symlink_to("units/one-0123456789abcdef")  # as --many leaves them
    checkpoint.save(other_values(checkpoint.load(exported.checkpoint)), tmp_path / "Two", settings={})
    given = ["export", str(tmp_path / "one"), str(tmp_path / "Two"), "--repository", str(exported.repository)]
    clips = exported.version / "clips"
    for more, words in (
        (["--name", "x"], "--name is for one checkpoint, and 2 are given"),
        (["--video", "x"], "--video is for one checkpoint"),
        ([str(tmp_path / "absent")], "absent does not exist"),
        ([str(tmp_path / "units" / ".." / "two")], "does not exist"),
        ([str(tmp_path / "units" / "one-0123456789abcdef" / ".." / ".." / "one")], "two checkpoints are called one"),
    ):
        assert cli.main([*given[:3], *more, *given[3:]]) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in clips.iterdir()] == ["first"]
    assert cli.main(given) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [str(clips / "one"), str(clips / "two")]
    assert sorted(path.name for path in clips.iterdir()) == ["first", "one", "two"]
