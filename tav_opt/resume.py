"""The state of a tuning run on disk, so that a run killed at any moment goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from tav_opt.checkpoint import load_tensors, save_tensors
from tav_opt.config import InputError

STATE = "resume.safetensors"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes the folder this process's own and clears what a killed one left half-written in it.

    The claim ends with the process, however that ends. Raises InputError when another process tunes there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except (FileExistsError, NotADirectoryError, PermissionError):
        raise InputError(f"{folder} is no folder that can be written: choose another --out") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left_over in folder.glob(".*-*/"):  # files.whole's
            shutil.rmtree(left_over)
        yield
    except BlockingIOError:
        raise InputError(f"{folder} is being tuned by another process: choose another --out") from None
    finally:
        os.close(descriptor)
        with suppress(OSError):  # a folder in which nothing came to be
            folder.rmdir()


def save(folder: Path, tensors: dict[str, Tensor], extra: dict[str, Any], settings: dict[str, Any]) -> None:
    """Writes the state as one file that takes the place of the last one."""
    metadata = {"settings": json.dumps(settings), "extra": json.dumps(extra)}
    save_tensors(tensors, folder / STATE, metadata)


def load(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the extra of the state, None where there is none.

    Raises InputError when it is of a run with other settings, naming the first that differs.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    tensors = load_tensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    before = json.loads(metadata["settings"])
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) != value:
            raise InputError(
                f"{folder} holds a run that was stopped, with {name} {before.get(name)!r}, not {value!r}: "
                f"give it the same settings, choose another --out, or delete {STATE} there"
            )
    return tensors, json.loads(metadata["extra"])


def remove(folder: Path) -> None:
    """Removes the state: the run has ended."""
    (folder / STATE).unlink(missing_ok=True)
