"""The state of a tuning run on disk, so that a run killed at any moment goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from tav_opt.checkpoint import load_tensors, save_tensors
from tav_opt.command import Interrupted
from tav_opt.config import InputError

STATE = "resume.safetensors"


class Claimed(InputError):
    """Another process tunes in the folder."""


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Makes the folder this process's own and clears what a killed one left half-written in it.

    The claim ends with the process, however that ends. Raises Claimed when another process tunes there.
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
        raise Claimed(f"{folder} is being tuned by another process: choose another --out") from None
    finally:
        os.close(descriptor)
        with suppress(OSError):  # a folder in which nothing came to be
            folder.rmdir()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether the block has been asked to end, which it shall do between two steps; raises Interrupted then.

    By Ctrl-C, SIGTERM or SIGHUP. A second signal does what it would have done outside.
    """
    asked: list[int] = []

    def take_note(number: int, _frame: object) -> None:
        asked.append(number)
        restore()
        with suppress(OSError):  # the terminal may have gone
            os.write(2, b"\nends after this step, and keeps its state; once more: ends at once\n")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if threading.current_thread() is not threading.main_thread():
        before.clear()
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, take_note)
    try:
        yield lambda: bool(asked)
    finally:
        restore()
    if asked:
        raise Interrupted(asked[0])


def save(folder: Path, tensors: dict[str, Tensor], extra: dict[str, Any], settings: dict[str, Any]) -> None:
    """Writes the state as one file that takes the place of the last one."""
    metadata = {"settings": json.dumps(settings), "extra": json.dumps(extra)}
    save_tensors(tensors, folder / STATE, metadata)


def saved_steps(folder: Path) -> int | None:
    """The steps that were done when the state was saved; None where there is none."""
    if not (folder / STATE).is_file():
        return None
    with safe_open(folder / STATE, "pt") as file:
        return int(file.get_slice("losses").get_shape()[0])


def load(
    folder: Path, settings: dict[str, Any], *, free: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the extra of the state, None where there is none.

    Raises InputError when it is of a run with other settings but the `free` ones, naming the first that differs.
    """
    path = folder / STATE
    if not path.is_file():
        return None
    check(folder, settings, free=free)
    return load_tensors(path), _told(path)[1]


def check(folder: Path, settings: dict[str, Any], *, free: Collection[str] = ()) -> None:
    """Raises InputError where a state is of a run with other settings but the `free` ones, naming the first."""
    path = folder / STATE
    if not path.is_file():
        return
    before, _ = _told(path)
    for name, value in json.loads(json.dumps(settings)).items():
        if name not in free and before.get(name) != value:
            why = f" (the {before['schedule']} learning rate depends on them)" if name == "steps" else ""
            raise InputError(
                f"{folder} holds the state of a run with {name} {before.get(name)!r}, not {value!r}{why}: "
                f"give it the same settings, choose another --out, or delete {STATE} there"
            )


def settings(folder: Path) -> dict[str, Any]:
    """Those of the run whose state is there, or none; raises InputError for a file that is no state."""
    path = folder / STATE
    return _told(path)[0] if path.is_file() else {}


def _told(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the extra in a state's file; raises InputError for a file that is no state."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        settings, extra = (json.loads(metadata[name]) for name in ("settings", "extra"))
    except (KeyError, ValueError, RecursionError):
        settings = extra = None
    if not isinstance(settings, dict) or not isinstance(extra, dict):
        raise InputError(f"{path} is no state of a tuning run: delete it to tune anew")
    return settings, extra


def remove(folder: Path) -> None:
    """Removes the state: the run has ended."""
    (folder / STATE).unlink(missing_ok=True)
