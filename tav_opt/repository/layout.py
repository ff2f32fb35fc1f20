"""Where everything lies in a model repository: bases, exported once, the clips on them, their engines."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_opt.clip_folder import ClipFolder
from tav_opt.config import InputError, PathLike
from tav_opt.contract import CLIP_NAME, STREAM_MODEL, VERSION, ClipInfo, check_clip_name
from tav_opt.files import MANIFEST, altered, discard, read_object, sha256, sweep

if TYPE_CHECKING:
    from tav_opt.schemas import Manifest

_LOG = logging.getLogger(__name__)
Stamp = tuple[int, int]
_ON_ITS_WAY = re.compile(r"\.(?P<name>[^.].*)\.(fresh|old)|\.\..+\.fresh-.+")
"""What is about to take a name's place, or has lost it, is beside it as `.name.fresh` and `.name.old`; and the names of
versions before."""
ENGINES = "engines"
"""The folder of a base that holds its engines, one folder per card, version and contract."""


def version_folder(repository: PathLike) -> Path:
    """Where a model repository keeps bases and clips."""
    return Path(repository) / STREAM_MODEL / str(VERSION)


def existing(repository: PathLike) -> Path:
    """The version folder; raises InputError for a folder that is no model repository."""
    version = version_folder(repository)
    if not version.is_dir():
        raise InputError(f"{repository} is no model repository: {version} does not exist")
    return version


def clip_folder(version: Path, name: str) -> Path:
    """Of a clip; raises InputError for what is no clip's name."""
    return version / "clips" / check_clip_name(name)


def base_folder(version: Path, name: str) -> Path:
    """Of a base, by `ClipInfo.exported_base`."""
    return version / "base" / name


def clip_names(version: Path) -> list[str]:
    """Of all clips that are there now."""
    found = (path.parent.name for path in version.glob(f"clips/*/{MANIFEST}"))
    return sorted(name for name in found if CLIP_NAME.match(name))


def manifest(folder: Path, kind: type[Manifest] | None = None) -> dict[str, Any]:
    """What the manifest of a folder says; raises InputError where that is not as `kind` has it."""
    from tav_opt import schemas

    found = read_object(folder / MANIFEST)
    schemas.check(kind or schemas.Manifest, found, folder / MANIFEST)
    return found


def all_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by name of a folder's files: those of `files`, and of graphs that were added to a base."""
    found = dict(manifest.get("files", {}))
    for added in manifest.get("added", {}).values():
        found |= added["files"]
    return found


def info_of(clip: Path) -> ClipInfo:
    """What is known of the clip in a folder."""
    return ClipFolder(clip, MANIFEST).info


def stamp(clip: Path) -> Stamp | None:
    """Another for every export of a clip; None where none is this moment."""
    try:
        found = (clip / MANIFEST).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def base_of(clip: Path) -> Path:
    """The folder of a clip's base."""
    return base_folder(clip.resolve().parents[1], info_of(clip).exported_base)


def find_clip(repository: PathLike, name: str) -> Path:
    """The folder of an exported clip; raises InputError, naming those there are, for another name."""
    version = version_folder(repository)
    clip = clip_folder(version, name)
    if not clip.is_dir():
        raise InputError(f"clip {name!r} is not in {repository}: {', '.join(clip_names(version)) or 'no clip is'}")
    return clip


def folders(parent: Path) -> list[Path]:
    """The clips, bases or engines in a folder, without what is only on its way in or out."""
    return sorted(path for path in parent.glob("*") if path.is_dir() and not path.name.startswith("."))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by name of all files in a folder."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def check_unaltered(folder: Path, needed: tuple[str, ...] = ()) -> None:
    """Raises InputError where a file that the folder's manifest names, or that is needed, is missing or altered."""
    found = manifest(folder).get("files", {})
    if changed := altered(folder, dict.fromkeys(needed, "") | found):
        raise InputError(f"{folder / changed[0]} is missing or altered: remove {folder} and export again")


def check_added(folder: Path, name: str) -> None:
    """Raises InputError where a file of a graph that was added to a base, or of what was made of it, is another."""
    found = manifest(folder).get("added", {})[name]["files"]
    if changed := altered(folder, found):
        raise InputError(f"{folder / changed[0]} is missing or altered: remove {folder} and export again")


def made_of_added(folder: Path, base: Path) -> dict[str, dict[str, Any]]:
    """What a folder beside a base's graphs says, by name, of those that it has of the graphs that were added to it."""
    there = manifest(base).get("added", {})
    found = manifest(folder).get("added", {})
    return {name: one for name, one in found.items() if name in there and one.get("made_of") == there[name]["files"]}


@contextmanager
def locked(folder: Path, *, writes: bool = True) -> Iterator[None]:
    """One export at a time: the second of two that need the same base finds it there.

    What one that was killed left on its way in or out is removed. Raises InputError where nothing can be written, or a
    link leads out; who only reads (`writes` false) needs no lock there.
    """
    if writes:
        within(folder.parents[1], folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if writes:
            raise InputError(f"{folder} cannot be written: {error.strerror}") from None
        yield
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for parent in (folder, folder / "clips", folder / "base"):
            _sweep(parent)
        yield
    finally:
        os.close(descriptor)


def within(root: Path, path: Path) -> Path:
    """The path itself, to write at; raises InputError where a link on its way leads out of a folder."""
    if not path.parent.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{path.parent} leads out of {root}: nothing is written there")
    return path


def _sweep(parent: Path) -> None:
    """Removes what a killed export left; one killed between taking the old away and putting the new there is ended.

    What is not yet whole has a lock of its own, which tells whether its maker lives: not all hold this folder's.
    """
    sweep(parent)
    for left in sorted(parent.glob(".*")):
        if not (found := _ON_ITS_WAY.fullmatch(left.name)):
            continue
        folder, old = left.with_name(found["name"] or left.name), left.with_suffix(".old")
        if left.suffix == ".fresh" and os.path.lexists(old) and not os.path.lexists(folder):
            os.replace(left, folder)  # it is whole, and the old one is gone for everyone else
            _LOG.warning("%s: put in its place, an export that was killed left it", left)
        else:
            discard(left)
            _LOG.warning("%s: swept, an export that was killed left it", left)
