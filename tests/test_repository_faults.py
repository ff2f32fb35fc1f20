"""Repositories that cannot be written, lead elsewhere, or were left by exports that were killed at a bad moment."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch
from exported import Exported, export_once, write_other

import tav_opt.tuning  # noqa: F401 — for whoever may not read it later
from tav_opt import checkpoint
from tav_opt.cli import main
from tav_opt.config import InputError
from tav_opt.engines import registry
from tav_opt.export import exporting
from tav_opt.repository import clips
from tav_opt.repository.layout import locked
from tav_opt.tuning_step import Training, restore, state_of


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def other(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other(exported, tmp_path_factory.mktemp("other"))


@pytest.fixture
def repository(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.repository, tmp_path / "repository"))


def folder_of(repository: Path) -> Path:
    return repository / "tune_a_video_stream" / "1" / "clips"


def copied(repository: Path, name: str) -> Path:
    """Another clip, as good as the first."""
    return Path(shutil.copytree(folder_of(repository) / "first", folder_of(repository) / name))


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob(".*")} - {".lock"}


@pytest.fixture
def in_reach() -> Iterator[Path]:
    """A folder that others may read; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_repository_that_may_only_be_read_is_listed_and_verified_and_refuses_changes_in_one_line(
    exported: Exported, other: Path, in_reach: Path
) -> None:
    """As somebody else, in a process that has all modules already: their own files may be closed to him."""
    tmp_path = in_reach
    repository = Path(shutil.copytree(exported.repository, tmp_path / "repository"))
    secret = Path(shutil.copytree(exported.checkpoint, tmp_path / "secret"))
    for path in (secret / "values.safetensors", copied(repository, "closed") / "values.safetensors"):
        path.chmod(0)
    shutil.copytree(other, tmp_path / "ckpt")
    commands = (
        ["clips", "list"], ["clips", "verify"], ["clips", "remove", "first"], ["clips", "add", "ckpt"],
        ["clips", "add", "secret"], ["edit", "secret", "--prompt", "x", "--out", "/dev/shm/x.mp4"],
        ["edit", "ckpt", "--prompt", "x", "--out", "x.mp4"],
        ["tune", "--model", "x", "--prompt", "x", "--video", "x.mp4", "--out", "out"],
    )  # fmt: skip
    told = as_somebody_else(tmp_path, commands)
    assert [status for status, _ in told] == [0, 1, 2, 2, 2, 2, 2, 2], told[-1]
    for _, line in told[2:]:
        assert line.count("\n") == 1 and ("cannot be written: P" in line or "cannot be read: P" in line), line
    assert told[1][1] == "" and clips.verify(repository) == []


def as_somebody_else(folder: Path, commands: tuple[list[str], ...]) -> list[tuple[int, str]]:
    """Status and stderr of each command."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.chdir(folder)
            os.setgid(10001)
            os.setuid(10001)
            with os.fdopen(writer, "w") as pipe:
                for command in commands:
                    found = [] if command[0] in ("edit", "tune") else ["--repository", "repository"]
                    with redirect_stderr(io.StringIO()) as err:
                        status = main([*command, *found])
                    pipe.write(json.dumps([status, err.getvalue()]) + "\n")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        lines = told.read().splitlines()
    os.waitpid(child, 0)
    return [tuple(json.loads(line)) for line in lines]


def test_an_export_killed_between_taking_the_old_clip_away_and_putting_the_new_one_there_is_brought_to_its_end(
    repository: Path, other: Path
) -> None:
    exporting.export(other, repository, name="second")
    new = (folder_of(repository) / "second" / "values.safetensors").read_bytes()
    os.replace(folder_of(repository) / "first", folder_of(repository) / ".first.old")
    os.replace(folder_of(repository) / "second", folder_of(repository) / ".first.fresh")
    with locked(folder_of(repository).parent):
        pass
    assert (folder_of(repository) / "first" / "values.safetensors").read_bytes() == new
    assert hidden(repository) == set() and [clip.name for clip in clips.clips(repository)] == ["first"]


def test_names_of_versions_before_are_swept_too(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("..second.fresh-abc123", ".second.fresh", ".third.old"):
        shutil.copytree(folder_of(repository) / "first", folder_of(repository) / name)
    assert clips.verify(repository) == []
    assert len(caplog.messages) == 3 and hidden(repository) == set()


def test_what_another_has_begun_beside_is_left_to_it_until_its_time_is_over(repository: Path) -> None:
    begun = folder_of(repository) / ".new-x1"
    begun.mkdir()
    assert clips.verify(repository) == [] and begun.is_dir()
    os.utime(begun, (1e9, 1e9))
    assert clips.verify(repository) == [] and not begun.exists()


@pytest.mark.parametrize("part", ["clips", "base", "base/*"])
def test_nothing_is_written_where_a_link_leads_out_of_the_repository(
    part: str, repository: Path, other: Path, tmp_path: Path
) -> None:
    (inside,) = folder_of(repository).parent.glob(part)
    outside = tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    before = set(outside.rglob("*"))
    with pytest.raises(InputError, match="leads out of"):
        if part == "base/*":
            with locked(inside / "engines"):
                pass
        else:
            exporting.export(other, repository, name="second")
    assert set(outside.rglob("*")) == before


def test_a_repositorys_lock_that_is_a_fifo_blocks_nobody(repository: Path) -> None:
    lock = folder_of(repository).parent / ".lock"
    lock.unlink(missing_ok=True)
    os.mkfifo(lock)
    assert clips.verify(repository) == []
    with pytest.raises(InputError, match="nobody"):
        clips.remove(repository, "nobody")


def test_a_file_of_tensors_beyond_any_clips_size_is_not_hashed(other: Path, repository: Path, tmp_path: Path) -> None:
    ckpt = Path(shutil.copytree(other, tmp_path / "ckpt"))
    exported = folder_of(repository) / "first"
    for folder, read in ((ckpt, checkpoint.load), (exported, registry.load)):
        os.truncate(folder / checkpoint.VALUES, 1 << 40)
        with pytest.raises(InputError, match=f"the tensors of a clip have {checkpoint.MAX_BYTES} at most"):
            read(folder)


@pytest.mark.parametrize("harm", ["gone", "another shape"])
def test_the_state_of_a_run_that_is_another_models_is_refused(harm: str) -> None:
    unet = torch.nn.Linear(3, 3)
    training = Training(
        trained=dict(unet.named_parameters()),
        optimizer=torch.optim.AdamW(unet.parameters()),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        losses=[0.5],
    )
    unet(torch.ones(1, 3)).sum().backward()
    training.optimizer.step()
    tensors, extra = state_of(training)
    restore(training, dict(tensors), extra)
    if harm == "gone":
        del tensors["exp_avg.weight"]
    else:
        tensors["exp_avg.weight"] = torch.zeros(2, 3)
    with pytest.raises(InputError, match=r"exp_avg\.weight is missing or another"):
        restore(training, tensors, extra)


def test_a_name_in_a_file_does_not_reach_the_terminal_as_it_is(other: Path, tmp_path: Path, capsys) -> None:
    ckpt = Path(shutil.copytree(other, tmp_path / "ckpt"))
    description = json.loads((ckpt / "checkpoint.json").read_text())
    description["files"]["\x1b[2J"] = "0"
    (ckpt / "checkpoint.json").write_text(json.dumps(description))
    assert main(["edit", str(ckpt), "--prompt", "x", "--out", str(tmp_path / "x.mp4")]) == 2
    said = capsys.readouterr().err
    assert said.rstrip("\n").isprintable(), said
