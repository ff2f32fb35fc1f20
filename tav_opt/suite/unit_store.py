"""Where the results of units lie: one folder each, whole or not there, and known by its key."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tav_opt.config import InputError
from tav_opt.files import read_object, whole, write_json
from tav_opt.suite.units import Unit

ABOUT = "unit.json"
"""Of a unit's folder, written last: a folder that has one is whole."""


@dataclass(frozen=True)
class UnitStore:
    """The folder of a suite's results, which all workers share."""

    root: Path

    def folder(self, unit: Unit | str) -> Path:
        """That of a unit, or of its id."""
        return self.root / "units" / (unit if isinstance(unit, str) else unit.id)

    def done(self, unit: Unit | str) -> bool:
        """Whether its result is there and whole."""
        return (self.folder(unit) / ABOUT).is_file()

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

    @contextmanager
    def continuing(self, unit: Unit, about: dict[str, Any]) -> Iterator[Path]:
        """Yields the unit's own folder, in which work goes on after a stop; it counts as whole after the block."""
        place = self.folder(unit)
        began = time.perf_counter()
        yield place
        write_json(place / ABOUT, _described(unit, about, began))

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


def _described(unit: Unit, about: dict[str, Any], began: float) -> dict[str, Any]:
    named = {"kind": unit.kind, "name": unit.name, "key": unit.key, "needs": unit.needs}
    return named | {"seconds": time.perf_counter() - began} | about
