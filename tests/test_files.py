"""What is written: whole or absent, for whom the umask says, under any name that the file system takes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import export_once

from tav_opt import checkpoint, plots, video
from tav_opt.config import InputError
from tav_opt.files import check_place, whole, write_json

LONGEST = 255
"""Bytes of a name on Linux's file systems."""


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in folder.rglob("*")}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_writer_leaves_the_modes_that_the_umask_gives(tmp_path, mask):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with umask(mask):
        checkpoint.save_tensors({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
        write_json(tmp_path / "x.json", {})
        plots.save_losses([1.0, 2.0], tmp_path)
        for name in ("x.mp4", "x.gif", "frames"):
            video.write(tmp_path / name, frames, 8)
        with whole(tmp_path / "below" / "folder") as folder:
            (folder / "deeper").mkdir(parents=True)
            torch.save({}, folder / "deeper" / "x.pt")
    found = modes(tmp_path)
    files = {"x.safetensors", "x.json", "loss.csv", "loss.png", "x.mp4", "x.gif", "frames/00000.png"}
    assert {*files, "below/folder/deeper/x.pt"} <= set(found)
    wrong = {
        name: oct(mode)
        for name, mode in found.items()
        if mode != (0o777 if (tmp_path / name).is_dir() else 0o666) & ~mask
    }
    assert not wrong


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read as somebody else")
def test_a_containers_user_can_read_an_export_and_its_checkpoint(golden, tmp_path_factory):
    exported = export_once(golden, tmp_path_factory.getbasetemp())
    for folder in (exported.repository, exported.checkpoint):
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        # From inside: the folders above are the tests' own.
        done = subprocess.run(
            ["cat", *files], cwd=folder, user=10001, group=10001, extra_groups=[], capture_output=True
        )
        assert done.returncode == 0 and len(files) >= 3, done.stderr.decode()
        assert len(done.stdout) == sum((folder / name).stat().st_size for name in files)


def test_names_up_to_the_file_systems_limit_are_written(tmp_path):
    path = tmp_path / ("é" * 125 + "x.mp4")
    assert len(os.fsencode(path.name)) == LONGEST
    check_place(path)
    video.write(path, np.zeros((2, 16, 16, 3), np.uint8), 8)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_place_where_nothing_can_be_written_is_told_beforehand_and_afterwards(tmp_path):
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path / ("x" * 256), "File name too long"),
        (tmp_path / ("x" * 256) / "x.mp4", "File name too long"),
        (tmp_path / "new" / ("x" * 256), "File name too long"),
        (tmp_path / "file" / "x.mp4", "(Not a directory|File exists)"),
        (Path("/proc/x.mp4"), "No such file"),
    ):
        for attempt in (check_place, lambda path: write_json(path, {})):
            with pytest.raises(InputError, match=f"cannot be written: {words}") as caught:
                attempt(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name != "new"] == ["file"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_without_rights_is_told_beforehand(tmp_path):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.chdir(tmp_path)
            os.setuid(10001)
            check_place(Path("new/x.mp4"))
        except InputError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as told:
        assert told.read() == "new/x.mp4 cannot be written: Permission denied"
