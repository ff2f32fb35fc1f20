"""Clips on disk: listed, added cheaply, removed with bases that nobody needs, verified; two processes at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exported import FRAMES, SIDE, Exported, export_once, write_other

from tav_opt import models
from tav_opt.cli import main
from tav_opt.config import InputError
from tav_opt.engines.registry import open_clip
from tav_opt.export import exporting
from tav_opt.repository import clips


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def other(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other(exported, tmp_path_factory.mktemp("other"))


@pytest.fixture
def repository(exported: Exported, tmp_path: Path) -> Path:
    """With the clip `first` and its base, and no others that tests of the shared one may have added."""
    copied = Path(shutil.copytree(exported.repository, tmp_path / "repository"))
    for path in (copied / "tune_a_video_stream" / "1" / "clips").iterdir():
        if path.name != "first":
            shutil.rmtree(path)
    return copied


def bases(repository: Path) -> list[str]:
    return [path.name for path in (repository / "tune_a_video_stream" / "1" / "base").iterdir()]


def files(repository: Path) -> set[Path]:
    return {path for path in repository.rglob("*") if path.is_file() and path.name != ".lock"}


def test_list_says_what_is_there(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clip,) = clips.clips(repository)
    folder = repository / "tune_a_video_stream" / "1"
    assert clip.size == sum(path.stat().st_size for path in (folder / "clips" / "first").iterdir())
    assert clip.base_size == sum(path.stat().st_size for path in next((folder / "base").iterdir()).iterdir())
    assert main(["clips", "list", "--repository", str(repository)]) == 0
    line = capsys.readouterr().out.strip()
    for part in ("first:", f"{FRAMES} frames of {SIDE}×{SIDE}", clip.info.exported_base, "a panda is skiing"):
        assert part in line


def test_a_repository_without_clips_says_so(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips.remove(repository, ("first",))
    assert main(["clips", "list", "--repository", str(repository)]) == 0
    told = capsys.readouterr()
    assert told.out == "" and told.err == f"tav-opt clips: {repository} has none: see --repository and `add`\n"


def test_adding_to_a_base_copies_values_only(
    repository: Path, other: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    before = files(repository)
    assert main(["clips", "add", str(other), "--repository", str(repository), "--name", "second"]) == 0
    assert "its base was there" in capsys.readouterr().out
    new = files(repository) - before
    assert {path.name for path in new} == {"values.safetensors", "latents.safetensors", "manifest.json"}
    assert {path.parent.name for path in new} == {"second"}


def test_a_base_goes_with_its_last_clip(repository: Path, other: Path) -> None:
    exporting.add(other, repository, name="second")
    (base,) = bases(repository)
    assert clips.remove(repository, ["first"]) == []
    assert bases(repository) == [base]
    assert open_clip(repository, "second", threads=1).info.frames == FRAMES
    assert clips.remove(repository, ["second"]) == [base]
    assert bases(repository) == [] and clips.clips(repository) == []


def test_removing_an_unknown_clip_removes_nothing(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(repository)
    assert main(["clips", "remove", "first", "nobody", "--repository", str(repository)]) == 2
    assert "clip 'nobody' is not in" in capsys.readouterr().err
    assert files(repository) == before
    with pytest.raises(InputError, match=r"'\.\./base'"):
        clips.remove(repository, ["../base"])


@pytest.mark.parametrize("name", ["base/*/unet.onnx.data", "clips/first/values.safetensors", "base/*/tokenizer.json"])
def test_verify_names_an_altered_file(repository: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["clips", "verify", "--repository", str(repository)]) == 0
    (path,) = (repository / "tune_a_video_stream" / "1").glob(name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main(["clips", "verify", "--repository", str(repository)]) == 1
    assert f"{path}: missing or altered" in capsys.readouterr().out


def test_verify_names_missing_and_unneeded_bases(repository: Path) -> None:
    folder = repository / "tune_a_video_stream" / "1"
    shutil.move(next((folder / "base").iterdir()), folder / "base" / "0000-4x64x64")
    missing, unneeded = clips.verify(repository)
    assert "its base" in missing and "is missing" in missing
    assert "0000-4x64x64: no clip needs it" in unneeded


def test_no_repository_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no model repository"):
        clips.clips(tmp_path)


ADD = """
import sys
from pathlib import Path
from tav_opt.export.exporting import add
for number in range(3):
    add(Path(sys.argv[1]), Path(sys.argv[2]), name="contested")
    add(Path(sys.argv[1]), Path(sys.argv[2]), name=f"{sys.argv[3]}-{number}")
"""


def test_two_processes_adding_at_once_corrupt_nothing(exported: Exported, repository: Path, other: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", ADD, path, repository, name], env=os.environ)
        for path, name in ((exported.checkpoint, "one"), (other, "two"))
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert clips.verify(repository) == []
    names = {clip.name for clip in clips.clips(repository)}
    assert names == {"first", "contested", *(f"{name}-{i}" for name in ("one", "two") for i in range(3))}
    kept = (repository / "tune_a_video_stream" / "1" / "clips" / "contested" / "values.safetensors").read_bytes()
    assert kept in [(path / "values.safetensors").read_bytes() for path in (exported.checkpoint, other)]
    hidden = [path for path in (repository / "tune_a_video_stream" / "1" / "clips").iterdir() if path.name[0] == "."]
    assert not hidden
