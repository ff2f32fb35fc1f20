"""Files that are either whole or absent: written beside, synced, renamed; and their hashes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from tav_opt.config import InputError

DESCRIPTION = "checkpoint.json"
"""Of a checkpoint, written last: a folder that has one is whole."""
MANIFEST = "manifest.json"
"""Of an exported base, a clip or a set of engines: what it is, and the hashes of its files."""
_LOG = logging.getLogger(__name__)
_POINTER = b"version https://git-lfs"
_URL = re.compile(r"[a-z][a-z0-9+]+:/")
"""As a path has it, which makes one of two slashes."""
_BESIDE = ".new-"
"""What lies beside begins so: short, since names have a limit."""
_BESIDE_SECONDS = 10.0
"""What is younger may be of one who has not yet taken its lock."""
MAX_JSON_BYTES = 64 << 20
"""The largest that people have, the index of a large model's shards, is some MB."""


class DiskFull(InputError):
    """Nothing more can be written: what follows would fail alike."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write a file or make a folder at; it becomes `path` only if the block succeeds.

    A folder replaces nothing: its name must be free. The suffix is kept, since writers choose formats by it. Whoever
    may read what the process makes may read it. Raises InputError when it cannot be written, as on a full disk.
    """
    beside = lock = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        beside = Path(tempfile.mkdtemp(prefix=_BESIDE, dir=path.parent))
        lock = _locked(beside)  # until the block ends, or the process
        mode = _given_mode(beside)
        temporary = beside / path.name
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            if file.is_file():
                file.chmod(mode)  # some writers, safetensors' among them, make files for their owner alone
            _sync(file)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno is None:  # a library's own
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(f"disk full while writing {path}: nothing was written") from error
        raise InputError(f"{path} cannot be written: {os.strerror(error.errno)}") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """As `whole`, for a folder that takes the place of one that is there, which stays as it was if the block fails."""
    fresh, old = (path.with_name(f".{path.name}.{age}") for age in ("fresh", "old"))
    discard(fresh)
    with whole(fresh) as folder:
        yield folder
    discard(old)
    if path.exists():
        os.replace(path, old)
    os.replace(fresh, path)
    discard(old)


def sweep(folder: Path) -> None:
    """Removes what processes that were killed left half-written in a folder: what nobody holds the lock of."""
    for left in folder.glob(f"{_BESIDE}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _BESIDE_SECONDS and (lock := _locked(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
                _LOG.warning("%s: swept, a process that ended amid its work left it", left)


def _locked(folder: Path) -> int | None:
    """The folder's descriptor with its lock, which ends with the process, if not before; None where another has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def discard(path: Path) -> None:
    """Removes a file, a link or a folder with all that is in it, if it is there; what a link leads to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def check_place(path: Path) -> None:
    """Raises InputError where no file or folder `path` could be written: said before the work that it is to hold.

    Folders that are missing on the way are no fault.
    """
    if _URL.match(str(path)):
        raise InputError(f"{path} is a URL, not a folder or file: nothing can be written there")
    try:
        home = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
        Path(tempfile.mkdtemp(prefix=_BESIDE, dir=home)).rmdir()
        for name in path.absolute().relative_to(home).parts:
            (home / name).exists()  # an error where the name is too long for the file system
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def user_cache() -> Path:
    """Where what can be had again is kept for this user."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # which its specification tells to ignore
        base = os.path.expanduser("~/.cache")
    return Path(base) / "tav-opt"


def _given_mode(folder: Path) -> int:
    """Permissions that a new file gets, by the umask or the folder's ACL; reading the umask would change it."""
    file = folder / "mode"
    file.touch()
    mode = file.stat().st_mode & 0o777
    file.unlink()
    return mode


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_plain(path: Path) -> BufferedReader:
    """A file, open to be read. Raises InputError for one that is absent, cannot be read, or is a pipe or a device.

    Nothing waits: whoever opened a pipe would wait for a writer, and everyone else for them.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        gone = f"is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "does not exist"
        raise InputError(f"{path} {gone}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise InputError(f"{path} cannot be read: it is no plain file")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file (paths as text), whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file; raises InputError when it is absent, cannot be read, or is not JSON that has one meaning."""
    refuse_pointer(path)
    with open_plain(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB")
    try:
        text = content.decode("utf-8-sig")  # some editors begin a file with a mark
        return json.loads(text, object_pairs_hook=_once_each)
    except RecursionError:
        raise InputError(f"{path} is not JSON: it is nested too deep") from None
    except ValueError as error:  # a number of thousands of digits is one too
        raise InputError(f"{path} is not JSON: {str(error).split(';')[0]}") from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} stands in it twice")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds names and values; raises InputError when it holds anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not names and values in braces")
    return value


def refuse_pointer(path: Path) -> bytes:
    """The first bytes of a file; raises InputError when it cannot be read, or is a pointer that git-lfs left."""
    with open_plain(path) as file:
        head = file.read(64)
    if head.startswith(_POINTER):
        raise InputError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` in {path.parent}")
    return head


def altered(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """Names of files in a folder that are missing, or whose content has another SHA-256."""
    return [
        name for name, expected in hashes.items() if not (folder / name).is_file() or sha256(folder / name) != expected
    ]
