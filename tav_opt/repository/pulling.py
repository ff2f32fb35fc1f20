"""Fetches a model repository that lies elsewhere: in an object store, on the hub, wherever fsspec reads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tav_opt import schemas
from tav_opt.config import InputError, PathLike, first_line
from tav_opt.contract import CLIP_NAME, ClipInfo
from tav_opt.files import MANIFEST, altered, discard, read_object, whole
from tav_opt.repository.layout import (
    ENGINES,
    all_files,
    base_folder,
    clip_folder,
    existing,
    locked,
    version_folder,
    within,
)
from tav_opt.repository.model_files import write_model_files

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What became of a clip, a base or a base's engines."""

    name: str
    """Its place below the version folder."""
    size: int
    """Bytes that were fetched; 0 where it was here already."""


def pull(url: str, repository: PathLike, on_folder: Callable[[Pulled], object] | None = None) -> list[Pulled]:
    """Fetches all clips of the model repository at `url`, their bases and engines, into one that is here.

    What is here as it is there, folder or file, is not fetched again; clips that are not there stay. Each folder is
    compared with the hashes of its manifest and then takes its place at once, a clip after its base. Raises InputError
    for what is no model repository, cannot be read, or is altered.
    """
    source = _Source(url)
    version = version_folder(repository)
    found = []
    with locked(version):
        for folder, manifest in source.folders():
            found.append(_fetched(source, folder, manifest, version))
            if on_folder is not None:
                on_folder(found[-1])
        write_model_files(Path(repository))
    existing(repository)
    return found


@dataclass(frozen=True)
class _Manifest:
    """Of a folder, read once: what has been looked through is what is installed."""

    content: bytes
    found: dict[str, Any]

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 by name."""
        return all_files(self.found)


class _Source:
    """A model repository's version folder, as fsspec reads it; whatever its libraries raise is an InputError."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url
        if "://" not in url:
            raise InputError(f"{url!r} is no URL, as s3://bucket/folder, hf://owner/name/folder or file:///folder")
        try:
            self._files: AbstractFileSystem
            self._files, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"{url}: {first_line(error)}") from None
        self._root = version_folder(PurePosixPath(root)).as_posix()  # type: ignore[arg-type]

    def folders(self) -> Iterator[tuple[str, _Manifest]]:
        """What a clip needs before it, each once: names below the version folder, and their manifests."""
        clips = [path for path in self._manifests("clips") if CLIP_NAME.match(path.parent.name)]
        if not clips:
            raise InputError(f"{self._url} holds no model repository with clips: {self._root}/clips is empty or absent")
        seen = set[str]()
        for path in clips:
            clip = path.parent.name
            described = self._manifest(f"clips/{clip}", schemas.ClipDescription)
            base = f"base/{ClipInfo.from_json(described.found).exported_base}"
            if base not in seen:
                seen.add(base)
                yield base, self._manifest(base, schemas.BaseManifest)
                for engines in self._manifests(f"{base}/{ENGINES}"):
                    folder = f"{base}/{ENGINES}/{engines.parent.name}"
                    yield folder, self._manifest(folder, schemas.Manifest)
            yield f"clips/{clip}", described

    def _manifests(self, parent: str) -> list[PurePosixPath]:
        with self._told():
            try:
                found = self._files.glob(f"{self._root}/{parent}/*/{MANIFEST}")
            except FileNotFoundError:  # of stores that tell an absent folder from an empty one
                found = []
        return [path for path in map(PurePosixPath, sorted(found)) if not path.parent.name.startswith(".")]

    def _manifest(self, folder: str, kind: type[schemas.Manifest]) -> _Manifest:
        """Of a folder, looked through as one that is here."""
        with tempfile.TemporaryDirectory() as here:
            self.fetch(folder, MANIFEST, Path(here))
            manifest = _Manifest((Path(here) / MANIFEST).read_bytes(), read_object(Path(here) / MANIFEST))
        schemas.check(kind, manifest.found, f"{self._url}: {folder}/{MANIFEST}")
        return manifest

    def fetch(self, folder: str, name: str, here: Path) -> None:
        """One file into a folder."""
        with self._told():
            self._files.get_file(f"{self._root}/{folder}/{name}", str(here / name))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store's library raises its own
            raise InputError(f"{self._url} cannot be read: {type(error).__name__}: {first_line(error)}") from None


def _fetched(source: _Source, folder: str, manifest: _Manifest, version: Path) -> Pulled:
    """A folder, which takes the place of the one of its name where that is another; of a base, engines stay."""
    place = within(version, _place(version, folder))
    if _is_here(place, manifest):
        return Pulled(name=folder, size=0)
    engines = place.parent if place.parent.name == ENGINES else place / ENGINES
    has_engines = engines.is_dir() and not place.is_symlink()  # what a link leads to stays where it is
    with locked(engines) if has_engines else nullcontext():  # those that are being built are finished first
        fresh, old = (place.with_name(f".{place.name}.{state}") for state in ("fresh", "old"))
        with whole(fresh) as temporary:
            temporary.mkdir()
            lacking = {name: sha256 for name, sha256 in manifest.files.items() if not _has(place, name, sha256)}
            for name in manifest.files:
                if name in lacking:
                    source.fetch(folder, name, temporary)
                else:
                    _linked(str(place / name), str(temporary / name))
            size = len(manifest.content) + sum((temporary / name).stat().st_size for name in lacking)
            if changed := altered(temporary, lacking):
                raise InputError(f"{folder}/{changed[0]} is not what its manifest says: it was altered, or cut short")
            (temporary / MANIFEST).write_bytes(manifest.content)
            if has_engines and engines.parent == place:
                shutil.copytree(engines, temporary / ENGINES, ignore=_on_its_way, copy_function=_linked)
        if place.exists() or place.is_symlink():
            os.replace(place, old)
        os.replace(fresh, place)
        discard(old)
    return Pulled(name=folder, size=size)


def _has(place: Path, name: str, sha256: str) -> bool:
    """Whether a folder that is here, of another manifest, has a file as it is there."""
    try:
        return not place.is_symlink() and not altered(place, {name: sha256})
    except InputError:  # one that may not be read
        return False


def _on_its_way(_folder: str, names: list[str]) -> set[str]:
    """What is only half there; but the lock stays the same file for all who wait for it."""
    return {name for name in names if name.startswith(".") and name != ".lock"}


def _linked(source: str, target: str) -> str:
    """The same file by another name, so that it is lost at no moment; a copy where there are no hard links."""
    with suppress(OSError):
        os.link(source, target)
        return target
    return shutil.copy2(source, target)


def _place(version: Path, folder: str) -> Path:
    """Where a folder goes; its names have been checked but for those of engines."""
    kind, name, *engines = folder.split("/")
    if kind == "clips":
        return clip_folder(version, name)
    return base_folder(version, name).joinpath(*engines)


def _is_here(place: Path, manifest: _Manifest) -> bool:
    try:
        return read_object(place / MANIFEST) == manifest.found and not altered(place, manifest.files)
    except InputError:
        return False
