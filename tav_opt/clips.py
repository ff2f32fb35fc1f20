"""The clips of a model repository on disk: what is there, adding, removing and verifying them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tav_opt.config import InputError
from tav_opt.contract import CLIP_NAME, STREAM_MODEL, VERSION, ClipInfo, check_clip_name
from tav_opt.engines.tensorrt_library import ENGINES
from tav_opt.export import repository as exported
from tav_opt.export.repository import MANIFEST, locked
from tav_opt.files import altered, read_json


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One exported clip: its folder's name, its description, its bytes on disk and those of its base."""

    name: str
    info: ClipInfo
    size: int
    base_size: int


@dataclass(frozen=True, kw_only=True)
class Added:
    """What adding a clip took; `graphs` says whether its base had to be exported."""

    clip: Clip
    seconds: float
    graphs: bool


def version_folder(repository: Path) -> Path:
    """Where a model repository keeps bases and clips; raises InputError for a folder that is none."""
    folder = repository / STREAM_MODEL / str(VERSION)
    if not folder.is_dir():
        raise InputError(f"{repository} is no model repository: {folder} does not exist")
    return folder


def clips(repository: Path) -> list[Clip]:
    """All exported clips, by name."""
    folder = version_folder(repository)
    names = sorted(path.parent.name for path in folder.glob(f"clips/*/{MANIFEST}") if CLIP_NAME.match(path.parent.name))
    return [_clip(folder, name) for name in names]


def _clip(folder: Path, name: str) -> Clip:
    info = ClipInfo.from_json(read_json(folder / "clips" / name / MANIFEST))
    sizes = [_size(path) for path in (folder / "clips" / name, folder / "base" / info.exported_base)]
    return Clip(name=name, info=info, size=sizes[0], base_size=sizes[1])


def _size(folder: Path) -> int:
    """Bytes of a folder's own files; engines of a base, in a folder of it, can be built again."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0


def add(checkpoint: Path, repository: Path, *, name: str | None = None, base: str | None = None) -> Added:
    """Exports a tuned clip: copies its values where its base is there in its size, else exports that first.

    Raises as `export.repository.export` does.
    """
    before = set(repository.glob(f"{STREAM_MODEL}/{VERSION}/base/*"))
    start = time.perf_counter()
    folder = exported.export(checkpoint, repository, name=name, base=base)
    seconds = time.perf_counter() - start
    clip = _clip(folder.parents[1], folder.name)
    return Added(clip=clip, seconds=seconds, graphs=folder.parents[1] / "base" / clip.info.exported_base not in before)


def remove(repository: Path, names: Iterable[str]) -> list[str]:
    """Removes clips, and every base that no clip needs any more; returns the names of those bases.

    Raises InputError, and removes nothing, when one of the clips is not there.
    """
    folder = version_folder(repository)
    chosen = [check_clip_name(name) for name in dict.fromkeys(names)]
    with locked(folder):
        for name in chosen:
            if not (folder / "clips" / name).is_dir():
                known = ", ".join(clip.name for clip in clips(repository)) or "no clip is"
                raise InputError(f"clip {name!r} is not in {repository}: {known}")
        for name in chosen:
            _remove(folder / "clips" / name)
        needed = {_base_of(path) for path in folder.glob(f"clips/*/{MANIFEST}")}
        unneeded = [path for path in sorted(_folders(folder / "base")) if path.name not in needed]
        for path in unneeded:
            with locked(path / ENGINES):  # engines that are being built are finished first
                _remove(path)
        return [path.name for path in unneeded]


def _base_of(manifest: Path) -> str:
    return ClipInfo.from_json(read_json(manifest)).exported_base


def _folders(parent: Path) -> Iterator[Path]:
    return (path for path in parent.glob("*") if path.is_dir() and not path.name.startswith("."))


def _remove(folder: Path) -> None:
    """Takes the name away at once; whoever reads the files has them until it is done."""
    going = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(folder, going)
    shutil.rmtree(going)


def verify(repository: Path) -> list[str]:
    """What is wrong with the files of all clips, bases and engines, one line each: altered, missing, or not needed."""
    folder = version_folder(repository)
    with locked(folder):
        found = [*_folders(folder / "clips"), *_folders(folder / "base"), *folder.glob(f"base/*/{ENGINES}/[!.]*")]
        problems = [problem for path in found for problem in _problems(path)]
        bases = {path.name for path in _folders(folder / "base")}
        needed = {path: _base_of(path) for path in folder.glob(f"clips/*/{MANIFEST}")}
        problems += [f"{path.parent}: its base {base} is missing" for path, base in needed.items() if base not in bases]
        problems += [f"{folder / 'base' / base}: no clip needs it" for base in sorted(bases - set(needed.values()))]
    return problems


def _problems(folder: Path) -> list[str]:
    try:
        hashes = read_json(folder / MANIFEST)["files"]
    except (InputError, KeyError, TypeError) as error:
        return [f"{folder}: no manifest of files ({error})"]
    return [f"{folder / name}: missing or altered" for name in altered(folder, hashes)]
