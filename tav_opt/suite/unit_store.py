"""Where the results of units lie: one folder each, whole or not there, and known by its key."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tav_opt.config import InputError, PathLike
from tav_opt.files import check_place, discard, read_object, sha256, user_cache, whole, write_json
from tav_opt.suite.elsewhere import HASHES, Elsewhere, contents
from tav_opt.suite.units import Unit

ABOUT = "unit.json"
"""Of a unit's folder, written last: a folder that has one is whole."""


@dataclass(frozen=True)
class UnitStore:
    """The folder of a suite's results, which all workers share; or this machine's copy of what they share at a URL."""

    root: Path
    there: Elsewhere | None = None
    """Where results count as done once they are whole there."""

    @classmethod
    def at(cls, out: PathLike) -> UnitStore:
        """A folder, or any URL that fsspec writes: of that, what this machine has is kept in the user's cache."""
        if "://" not in str(out):
            return cls(Path(out))
        there = Elsewhere(str(out))
        return cls(user_cache() / "suites" / hashlib.sha256(there.url.encode()).hexdigest()[:16], there)

    def check(self) -> None:
        """Raises InputError where nothing could be written: said before the work that it is to hold."""
        check_place(self.root / "units")
        if self.there is not None:
            self.there.check()

    def folder(self, unit: Unit | str) -> Path:
        """That of a unit, or of its id, on this machine."""
        return self.root / _place(unit)

    def done(self, unit: Unit | str) -> bool:
        """Whether its result is there and whole."""
        return self.is_here(unit) if self.there is None else self.there.is_whole(_place(unit), ABOUT)

    def all_done(self, planned: Iterable[Unit]) -> set[str]:
        """The ids of those whose results are there and whole; of a URL, by one look at all of them."""
        if self.there is None:
            return {unit.id for unit in planned if self.is_here(unit)}
        found = self.there.marked("units/*/*", ABOUT)
        return {unit.id for unit in planned if _place(unit) in found}

    def is_here(self, unit: Unit | str) -> bool:
        """Whether its result is whole on this machine."""
        return (self.folder(unit) / ABOUT).is_file()

    def keep(self, unit: Unit) -> bool:
        """Whether its result is there and whole; what is whole here alone, as after a stop, is put there."""
        if not self.done(unit):
            if not self.is_here(unit):
                return False
            self._put(unit)
        return True

    def fetched(self, unit: Unit | str) -> Path:
        """Its folder, whole on this machine: it is fetched if it is not."""
        folder = self.folder(unit)
        if self.there is not None and not self.is_here(unit):
            with self._alone():  # the workers of one machine share its copies
                if not self.is_here(unit):
                    discard(folder)
                    self.there.get(_place(unit), folder, ABOUT)
        return folder

    def _put(self, unit: Unit) -> None:
        """A result that is whole here becomes so there, if it lies elsewhere."""
        if self.there is not None:
            folder = self.folder(unit)
            hashes = {name: sha256(folder / name) for name in contents(folder) if name != ABOUT}
            write_json(folder / ABOUT, read_object(folder / ABOUT) | {HASHES: hashes})
            self.there.put(folder, _place(unit), ABOUT)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".fetching").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def about(self, unit: Unit | str) -> dict[str, Any]:
        """What is said of a result; raises InputError for one of another key, as after a file was copied by hand."""
        found = read_object(self.folder(unit) / ABOUT)
        if isinstance(unit, Unit) and found.get("key") != unit.key:
            raise InputError(f"{self.folder(unit)} is of another unit: delete it to compute it anew")
        return found

    @contextmanager
    def writing(self, unit: Unit, about: dict[str, Any]) -> Iterator[Path]:
        """Yields a folder to write to, which becomes the unit's only if the block succeeds; `about` may be filled."""
        place = self.folder(unit)
        began = time.perf_counter()
        if place.exists():  # left half-written by hand, or by another program: results appear at once
            shutil.rmtree(place)
        with whole(place) as beside:
            beside.mkdir()
            yield beside
            write_json(beside / ABOUT, _described(unit, about, began))
        self._put(unit)

    @contextmanager
    def continuing(self, unit: Unit, about: dict[str, Any]) -> Iterator[Path]:
        """Yields the unit's own folder, in which work goes on after a stop; it counts as whole after the block."""
        place = self.folder(unit)
        began = time.perf_counter()
        yield place
        write_json(place / ABOUT, _described(unit, about, began))
        self._put(unit)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the folder one driver's own; raises InputError when another process evaluates there."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{self.root} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise InputError(f"{self.root} is being evaluated by another process: choose another --out") from None
        finally:
            os.close(descriptor)


def _place(unit: Unit | str) -> str:
    return f"units/{unit if isinstance(unit, str) else unit.id}"


def _described(unit: Unit, about: dict[str, Any], began: float) -> dict[str, Any]:
    named = {"kind": unit.kind, "name": unit.name, "key": unit.key, "needs": unit.needs}
    return named | {"seconds": time.perf_counter() - began} | about
