"""Units in the order of their needs, each once: in this process or by workers, whatever fails reported at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tav_opt.command import MAX_LINE
from tav_opt.config import InputError, first_line
from tav_opt.files import DiskFull
from tav_opt.suite.unit_store import UnitStore
from tav_opt.suite.units import Unit, model_of
from tav_opt.suite.waiting import Waiting
from tav_opt.suite.workshop import Workshop


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A unit that has ended, and how."""

    unit: Unit
    seconds: float
    fault: str | None = None
    """What was wrong, in one line."""
    fatal: bool = False
    """All others would fail alike."""


class Pool(Protocol):
    """Who does units: this process, or Ray's workers."""

    def room(self) -> bool:
        """Whether another unit can be started now."""

    def held(self) -> Collection[str]:
        """Names of the models that those who are idle have in hand (units.model_of)."""

    def start(self, unit: Unit) -> None:
        """Begins a unit, whose needs are done."""

    def wait(self) -> Ended | None:
        """The next unit that ends; None where there is room that was not there before."""


@dataclass
class InProcess:
    """One unit after the other in this process."""

    workshop: Workshop
    on_step: Callable[[Unit, str, int, int], object] = lambda *_: None
    _next: Unit | None = None
    _held: str = ""

    def room(self) -> bool:
        return self._next is None

    def held(self) -> Collection[str]:
        return [self._held]

    def start(self, unit: Unit) -> None:
        self._next = unit

    def wait(self) -> Ended:
        assert self._next is not None
        unit, self._next = self._next, None
        self._held = model_of(unit) or self._held
        return attempt(self.workshop, unit, lambda *step: self.on_step(unit, *step))


def attempt(workshop: Workshop, unit: Unit, on_step: Callable[[str, int, int], object]) -> Ended:
    """Does a unit; what it raises becomes one line."""
    began = time.perf_counter()
    fault, fatal = None, False
    try:
        workshop.do(unit, on_step)
    except DiskFull as error:
        fault, fatal = str(error), True
    except InputError as error:
        fault = str(error)
    except Exception as error:  # one clip's trouble is not the others'
        fault = f"{type(error).__name__}: {first_line(error)}"[:MAX_LINE]
    return Ended(unit=unit, seconds=time.perf_counter() - began, fault=fault, fatal=fatal)


@dataclass
class Progress:
    """How far an evaluation is."""

    total: int
    workers: int
    left: Counter[Any]
    """Units that are not done, by kind."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of those that were done, in this run or before, by kind."""

    def seconds_left(self) -> float | None:
        """By the mean of each kind; None as long as one of a kind that is left was never done."""
        if any(count and not self.seconds.get(kind) for kind, count in self.left.items()):
            return None
        means = {kind: sum(found) / len(found) for kind, found in self.seconds.items() if found}
        return sum(count * means[kind] for kind, count in self.left.items() if count) / self.workers


@dataclass(frozen=True)
class Outcome:
    """What an evaluation came to."""

    units: list[Unit]
    faults: dict[str, str]
    """By the names of units that failed."""
    kept_back: list[str]
    """Names of units that need one that failed."""
    report: Path | None = None
    """The page."""
    report_url: str | None = None
    """The same, where results lie at a URL."""


OnEnd = Callable[[Ended, Progress], object]


def run(planned: list[Unit], store: UnitStore, pool: Pool, workers: int, on_end: OnEnd) -> Outcome:
    """Does all units that are not done, each once all that it needs is.

    Raises DiskFull at once; every other fault is reported, and the units that do not depend on it are done.
    """
    faults: dict[str, str] = {}
    done = store.all_done(planned)
    waiting = Waiting(planned, done, model_of)
    left = Counter[str](unit.kind for unit in planned if unit.id not in done)
    progress = Progress(len(planned), workers, left, _seconds(planned, store, done))
    kept_back: list[Unit] = []
    running = 0
    while waiting or running:
        while pool.room() and (unit := waiting.take(pool.held())) is not None:
            pool.start(unit)
            running += 1
        ended = pool.wait()
        if ended is None:
            continue
        running -= 1
        progress.left[ended.unit.kind] -= 1
        if ended.fatal:
            raise DiskFull(str(ended.fault))
        if ended.fault is None:
            waiting.end(ended.unit)
            progress.seconds.setdefault(ended.unit.kind, []).append(ended.seconds)
        else:
            faults[_told(ended.unit, faults)] = ended.fault
            lost = waiting.give_up(ended.unit)
            progress.left.subtract(unit.kind for unit in lost)
            kept_back += lost
        on_end(ended, progress)
    return Outcome(planned, faults, [f"{unit.kind} {unit.name}" for unit in kept_back])


def _told(unit: Unit, faults: Collection[str]) -> str:
    """A name of its own for a unit that failed: a video may be tuned in several ways."""
    name = f"{unit.kind} {unit.name}"
    return f"{name} ({unit.key[:8]})" if name in faults else name


def _seconds(planned: list[Unit], store: UnitStore, done: set[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for unit in planned:
        if unit.id in done and store.is_here(unit):
            found.setdefault(unit.kind, []).append(float(store.about(unit).get("seconds", 0.0)))
    return found
