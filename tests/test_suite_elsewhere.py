"""Results at a URL: whole or not there, gone on from, fetched where they are needed; fsspec's memory stands for all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from suites import FRAMES, PLACE, ended, entry, evaluate, random_video

from tav_opt import cli
from tav_opt.suite.elsewhere import HASHES, Elsewhere
from tav_opt.suite.suite_file import read_suite
from tav_opt.suite.unit_store import ABOUT, UnitStore
from tav_opt.suite.units import Place, units
from tav_opt.suite.workshop import EDIT, METRICS, Workshop

URL = "memory://bucket/run"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty store, and a user's cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


@pytest.fixture
def suite(small: Any, tmp_path: Path) -> Path:
    """One video, an edit tuned for and one that is there: six units."""
    (tmp_path / "done" / "dog").mkdir(parents=True)
    random_video(tmp_path / "done" / "dog" / "subject.mp4", FRAMES, seed=3)
    return small(videos=[entry("dog.mp4")], methods={"ours": None, "ready": {"folder": "done"}})


def evaluated(capsys: pytest.CaptureFixture[str], *given: Any) -> tuple[int, str, list[str], str]:
    """Status, stdout, the units that were done, the last line of stderr."""
    status, said, error = evaluate(capsys, *given)
    return status, said, ended(error), error.splitlines()[-1] if error else ""


def content(files: Any) -> dict[str, bytes]:
    return {path.removeprefix("/bucket/run/"): files.cat(path) for path in files.find("/bucket/run")}


def without_times(about: bytes) -> dict[str, Any]:
    return {name: value for name, value in json.loads(about).items() if name not in ("seconds", "files")}


def test_what_lies_there_is_what_a_folder_would_have(
    suite: Path, store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same units, and nothing of them twice: on this machine, then on one that has nothing yet."""
    status, said, done, last = evaluated(capsys, suite, "--out", URL)
    assert status == 0 and len(done) == 6, last
    assert said.splitlines()[1] == f"{URL}/report/index.html" and Path(said.splitlines()[0]).is_file()
    assert cli.main(["evaluate", str(suite), "--out", str(tmp_path / "out")]) == 0
    there, here = content(store), {p: (tmp_path / "out" / p) for p in map(str, files_below(tmp_path / "out"))}
    assert there.keys() == here.keys()
    for name, path in here.items():
        if path.name == ABOUT:
            assert without_times(there[name]) == without_times(path.read_bytes())
        elif path.suffix in (".npy", ".safetensors", ".csv") or path.name == METRICS:
            assert there[name] == path.read_bytes(), name
    shutil.rmtree(tmp_path / "cache")
    status, _, done, last = evaluated(capsys, suite, "--out", URL)
    assert status == 0 and not done, "all of it is there"
    assert content(store)["report/report.csv"] == there["report/report.csv"]
    (edit,) = store.glob("/bucket/run/units/edit/ours--*")
    store.rm_file(f"{edit}/{ABOUT}")
    shutil.rmtree(tmp_path / "cache")
    assert evaluated(capsys, suite, "--out", URL)[2] == ["edit ours--dog--subject"], "what has no mark is not whole"


def files_below(folder: Path) -> list[Path]:
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    found = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return [path for path in found if not path.name.startswith(f"{EDIT}.")]  # embeddings, kept beside once measured


def test_what_breaks_off_while_it_is_put_there_is_not_counted_and_not_computed_again(
    suite: Path, store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = type(store).put_file

    def breaks(self: Any, here: str, there: str, *rest: Any, **more: Any) -> None:
        if there.endswith(EDIT):
            raise ConnectionError("the store is gone")
        before(self, here, there, *rest, **more)

    monkeypatch.setattr(type(store), "put_file", breaks)
    status, _, done, last = evaluated(capsys, suite, "--out", URL)
    assert (
        status == 2
        and f"{URL}/units/edit/ready" in last
        and "cannot be written: ConnectionError: the store is gone" in last
    )
    assert done == ["source dog"] and len(store.glob("/bucket/run/units/*/*/unit.json")) == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (whole,) = (tmp_path / "cache").glob("tav-opt/suites/*/units/edit/*/edit.mp4")
    written = whole.stat().st_mtime_ns
    status, _, done, last = evaluated(capsys, suite, "--out", URL)
    assert status == 0 and len(done) == 5 and whole.stat().st_mtime_ns == written, last


def test_workers_of_two_machines_share_what_is_there(suite: Path, store: Any, tmp_path: Path) -> None:
    """One reads and tunes, the other, whose own folder is empty, edits and measures."""
    found, place = read_suite(suite), Place(**PLACE)
    planned = units(found, place)
    one, other = (UnitStore(tmp_path / name, Elsewhere(URL)) for name in ("one", "other"))
    for number, unit in enumerate(planned):
        mine = one if number < 2 else other
        assert all(mine.done(need) for need in unit.needs), "as seen from the other"
        Workshop(found, place, mine).do(unit)
    assert other.all_done(planned) == {unit.id for unit in planned} == one.all_done(planned)
    assert not one.is_here(planned[2]) and other.is_here(planned[0])
    Workshop(found, place, one).do(planned[2])
    assert not one.folder(planned[2]).exists(), "what is done there is not done again"
    (edit,) = store.glob(f"/bucket/run/units/edit/ready--*/{EDIT}")
    store.pipe_file(edit, store.cat(edit)[:-1] + b"x")
    with pytest.raises(Exception, match=r"edit\.mp4 is not what was written: altered, or cut short"):
        one.fetched(next(unit for unit in planned if unit.name.startswith("ready") and unit.kind == "edit"))
    about = json.loads(store.cat(edit.replace(EDIT, ABOUT)))
    store.pipe_file(edit.replace(EDIT, ABOUT), json.dumps(about | {HASHES: {"../out": "0" * 64}}).encode())
    with pytest.raises(Exception, match="leads out of"):
        one.fetched(next(unit for unit in planned if unit.name.startswith("ready") and unit.kind == "edit"))
    assert HASHES in about and not list(tmp_path.rglob("out"))


@pytest.mark.parametrize(
    ("out", "more", "words"),
    [
        ("nowhere://x/y", [], "nowhere://x/y: Protocol not known: nowhere"),
        (URL, ["--workers", "2"], "memory://bucket/run is seen by this process alone"),
        ("file:///proc/absent/run", [], "file:///proc/absent/run/ cannot be written"),
        ("x", ["--report", "--dry"], "--report does nothing with --dry"),
        ("x", ["--report", "--workers", "2"], "--workers does nothing with --report"),
        ("x", ["--report"], "has no edit of"),
        ("x", ["--teraflops", "9"], "--teraflops does nothing without --dry"),
    ],
)
def test_what_will_not_do_is_one_line(
    suite: Path, store: Any, capsys: pytest.CaptureFixture[str], out: str, more: list[str], words: str
) -> None:
    status, _, done, last = evaluated(capsys, suite, "--out", out, *more)
    assert status == 2 and words in last and not done, last


def test_checkpoints_are_not_written_to_a_folder_called_as_a_url(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips.csv").write_text("video,prompt\ndog.mp4,a dog\n")
    given = ["tune", "--model", str(read_suite(suite).model), "--many", "clips.csv", "--frames", "3"]
    assert cli.main([*given, "--height", "64", "--width", "64", "--out", "s3://bucket/ckpts"]) == 2
    assert "s3:/bucket/ckpts/dog is a URL" in capsys.readouterr().err and not (tmp_path / "s3:").exists()


def test_a_report_of_what_is_done_says_what_is_not(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While another process evaluates: its folder is its own, the report is written all the same."""
    found, place = read_suite(suite), Place(**PLACE)
    store = UnitStore(tmp_path / "out")
    for unit in units(found, place):
        if unit.kind == "source" or unit.name.startswith("ready"):
            Workshop(found, place, store).do(unit)
    with store.claimed():
        status, said, done, last = evaluated(capsys, suite, "--out", store.root, "--report")
    assert status == 0 and not done, last
    told = (Path(said.strip()).parent / "report.md").read_text()
    assert "Not all is done. Of the 1 edits are measured: ours 0, ready 1." in told and "| ready | 1 |" in told
