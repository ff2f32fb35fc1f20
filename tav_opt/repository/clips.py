"""The clips of a model repository on disk: what is there, removing and verifying them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tav_opt.config import InputError, PathLike, texts
from tav_opt.contract import ClipInfo
from tav_opt.files import altered, discard
from tav_opt.repository.layout import (
    ENGINES,
    all_files,
    base_folder,
    base_of,
    clip_folder,
    clip_names,
    existing,
    find_clip,
    folders,
    info_of,
    locked,
    manifest,
)

OnDamaged = Callable[[str, InputError], object]
"""Called with the name of each clip that cannot be read, and why."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One exported clip: its folder's name, its description, its bytes on disk and those of its base."""

    name: str
    info: ClipInfo
    size: int
    base_size: int


def clips(repository: PathLike, on_damaged: OnDamaged | None = None) -> list[Clip]:
    """All exported clips, by name; raises InputError for a folder that is no model repository.

    One that cannot be read raises InputError too, unless `on_damaged` takes note of it.
    """
    version, found = existing(repository), []
    for name in clip_names(version):
        try:
            found.append(described(clip_folder(version, name)))
        except InputError as error:
            if on_damaged is None:
                raise
            on_damaged(name, error)
    return found


def described(clip: PathLike) -> Clip:
    """What is known of the exported clip in a folder."""
    clip = Path(clip)
    return Clip(name=clip.name, info=info_of(clip), size=_size(clip), base_size=_size(base_of(clip)))


def _size(folder: Path) -> int:
    """Bytes of a folder's own files; engines of a base, in a folder of it, can be built again."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0


def remove(repository: PathLike, names: str | Iterable[str]) -> list[str]:
    """Removes clips, and every base that no clip needs any more; returns the names of those bases.

    Where a clip is left that cannot be read every base stays: it may need it. Raises InputError, and removes nothing,
    when one of the clips is not there.
    """
    version = existing(repository)
    with locked(version):
        for clip in [find_clip(repository, name) for name in dict.fromkeys(texts("clips", names))]:
            _remove(clip)
        needed, damaged = _bases_of_clips(version)
        unneeded = [] if damaged else [base for base in folders(version / "base") if base not in needed.values()]
        for base in unneeded:
            with locked(base / ENGINES):  # engines that are being built are finished first
                _remove(base)
        return [base.name for base in unneeded]


def _bases_of_clips(version: Path) -> tuple[dict[Path, Path], list[str]]:
    """The base of each clip; and what is wrong with those that cannot be read."""
    needed, damaged = {}, []
    for name in clip_names(version):
        clip = clip_folder(version, name)
        try:
            needed[clip] = base_of(clip)
        except InputError as error:
            damaged.append(f"{clip}: cannot be read: {error}")
    return needed, damaged


def _remove(folder: Path) -> None:
    """Takes the name away at once; whoever reads the files has them until it is done."""
    going = folder.with_name(f".{folder.name}.old")
    discard(going)
    os.replace(folder, going)
    discard(going)


def verify(repository: PathLike) -> list[str]:
    """What is wrong with the files of all clips, bases and engines, one line each: altered, missing, or not needed."""
    version = existing(repository)
    with locked(version, writes=False):
        bases = folders(version / "base")
        found = [
            *folders(version / "clips"),
            *bases,
            *(engines for base in bases for engines in folders(base / ENGINES)),
        ]
        problems = [problem for folder in found for problem in _problems(folder)]
        needed, damaged = _bases_of_clips(version)
        problems += damaged
        problems += [f"{clip}: its base {base.name} is missing" for clip, base in needed.items() if base not in bases]
        unneeded = [] if damaged else sorted(set(bases) - set(needed.values()))
        problems += [f"{base_folder(version, base.name)}: no clip needs it" for base in unneeded]
    return problems


def _problems(folder: Path) -> list[str]:
    try:
        if "files" not in (told := manifest(folder)):
            raise InputError("'files'")
    except InputError as error:
        return [f"{folder}: no manifest of files ({error})"]
    try:
        return [f"{folder / name}: missing or altered" for name in altered(folder, all_files(told))]
    except InputError as error:  # one that may not be read
        return [str(error)]
