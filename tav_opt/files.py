"""Files that are either whole or absent: written beside, synced, renamed; and their hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tav_opt.config import InputError

DESCRIPTION = "checkpoint.json"
"""Of a checkpoint, written last: a folder that has one is whole."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write a file or make a folder at; it becomes `path` only if the block succeeds.

    A folder replaces nothing: its name must be free. The suffix is kept, since writers choose formats by it. Raises
    InputError when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    temporary = beside / path.name
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            _sync(file)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(f"disk full while writing {path}: nothing was written") from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_checkpoint(folder: Path) -> None:
    """Raises InputError for a folder that is no finished checkpoint, before anything is loaded that takes seconds."""
    if not (folder / DESCRIPTION).is_file():
        kind = "is half-written: tuning did not finish" if any(folder.glob("resume*")) else "is not a checkpoint"
        raise InputError(f"{folder} {kind} (no {DESCRIPTION})")


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content; raises InputError when it cannot be read or has more than `most` bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > most:
        raise InputError(f"{path} has more than {most} bytes, the most that are sent")
    return content


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file (paths as text), whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises InputError when it is absent or not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def altered(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """Names of files in a folder that are missing, or whose content has another SHA-256."""
    return [
        name for name, expected in hashes.items() if not (folder / name).is_file() or sha256(folder / name) != expected
    ]
