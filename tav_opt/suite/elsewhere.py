"""Results that lie at a URL: in an object store, on a server, wherever fsspec writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tav_opt.config import InputError, first_line
from tav_opt.files import DiskFull, altered, read_object, whole
from tav_opt.repository.layout import within

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

HASHES = "files"
"""Of a folder's mark, a JSON file: the SHA-256 of each of its other files."""


class Elsewhere:
    """Folders at a URL, each whole or not there: its mark, one of its files, is written last.

    Whatever fsspec's libraries raise is an InputError; of writing one that ends the run, since all would fail alike.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        assert self._opened, "said now, not amid the work"

    def __reduce__(self) -> tuple[type[Elsewhere], tuple[str]]:
        return Elsewhere, (self.url,)  # a connection is each process's own

    @cached_property
    def _opened(self) -> tuple[AbstractFileSystem, str]:
        """The store, and the folder in it."""
        import fsspec

        try:
            files, folder = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise InputError(f"{self.url}: {first_line(error)}") from None
        return files, str(folder).rstrip("/")

    @property
    def is_this_process(self) -> bool:
        """Whether no other process sees it."""
        return "memory" in self._opened[0].protocol

    def check(self) -> None:
        """Raises InputError where nothing can be written: said before the work that it is to hold."""
        files, folder = self._opened
        probe = f"{folder}/probe-{uuid4().hex}"
        with self._writing(""):
            files.makedirs(folder, exist_ok=True)
            files.pipe_file(probe, b"-")
            files.rm_file(probe)

    def marked(self, pattern: str, mark: str) -> set[str]:
        """Names of all folders of a pattern, such as `units/*/*`, that are whole."""
        files, folder = self._opened
        with self._reading(pattern):
            files.invalidate_cache()
            try:
                found: Any = files.glob(f"{folder}/{pattern}/{mark}")
            except FileNotFoundError:  # of stores that tell an absent folder from an empty one
                found = ()
        return {str(path)[len(folder) + 1 : -len(mark) - 1] for path in found}

    def is_whole(self, name: str, mark: str) -> bool:
        """Whether a folder is there to its last file."""
        files, folder = self._opened
        with self._reading(name):
            files.invalidate_cache()
            return bool(files.exists(f"{folder}/{name}/{mark}"))

    def get(self, name: str, here: Path, mark: str) -> None:
        """Fetches a folder, whole or not at all, into one that is not here yet.

        Raises InputError for what is not there, and for what is not what its mark says: altered, or cut short.
        """
        files, folder = self._opened
        with whole(here) as fresh:
            fresh.mkdir()
            with self._reading(name):
                files.get_file(f"{folder}/{name}/{mark}", str(fresh / mark))
                hashes = read_object(fresh / mark).get(HASHES) or {}
                for file in hashes:
                    place = within(fresh, fresh / file)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    files.get_file(f"{folder}/{name}/{file}", str(place))
            if changed := altered(fresh, hashes):
                raise InputError(f"{self.url}/{name}/{changed[0]} is not what was written: altered, or cut short")

    def put(self, here: Path, name: str, mark: str) -> None:
        """Writes a folder, its mark last, and removes what another of its name had beside."""
        files, folder = self._opened
        place = f"{folder}/{name}"
        with self._writing(name):
            before = self._there(place)
            if mark in before:  # while it is written anew it is not there
                files.rm_file(f"{place}/{mark}")
                before.discard(mark)
            for file in sorted(contents(here), key=lambda file: (file == mark, file)):
                files.makedirs(f"{place}/{file}".rpartition("/")[0], exist_ok=True)
                files.put_file(str(here / file), f"{place}/{file}")
                before.discard(file)
            for file in before:
                files.rm_file(f"{place}/{file}")

    def _there(self, place: str) -> set[str]:
        files, _ = self._opened
        files.invalidate_cache()
        try:
            return {str(path)[len(place) + 1 :] for path in files.find(place)}
        except FileNotFoundError:
            return set()

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # each store's library raises its own
            told = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{self.url}/{name} cannot be read: {told}") from None

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each store's library raises its own
            told = f"{type(error).__name__}: {first_line(error)}"
            raise DiskFull(f"{self.url}/{name} cannot be written: {told}") from None


def contents(folder: Path) -> list[str]:
    """Names of all files of a folder but hidden ones, as of what a killed process left on its way."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]
