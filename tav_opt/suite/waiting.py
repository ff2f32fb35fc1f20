"""Units that wait: for what they need, then for a worker; the next is found at once among any number."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tav_opt.suite.units import Unit


class Waiting:
    """Those of a plan that are not done; each is taken once, or given up."""

    def __init__(self, planned: Sequence[Unit], done: Collection[str], model_of: Callable[[Unit], str]) -> None:
        self._model_of = model_of
        self._place = {unit.id: place for place, unit in enumerate(planned)}
        self._left = {unit.id: unit for unit in planned if unit.id not in done}
        self._lacking = {id_: set(unit.needs).difference(done) for id_, unit in self._left.items()}
        self._needing: dict[str, list[str]] = {}
        self._ready: dict[str, list[tuple[int, str]]] = {}
        """By model, in the order of the plan."""
        for id_, lacks in self._lacking.items():
            for need in lacks:
                self._needing.setdefault(need, []).append(id_)
            if not lacks:
                self._is_ready(id_)

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self, held: Collection[str]) -> Unit | None:
        """The first that can be done with a model in hand, or with none; else the first that can be done."""
        liked = [name for name in ("", *held) if self._ready.get(name)]
        names = liked or [name for name, own in self._ready.items() if own]
        if not names:
            return None
        _, id_ = heapq.heappop(min((self._ready[name] for name in names), key=lambda own: own[0]))
        return self._left.pop(id_)

    def end(self, unit: Unit) -> None:
        """A unit is done: those that needed it alone are ready."""
        for id_ in self._needing.pop(unit.id, ()):
            self._lacking[id_].discard(unit.id)
            if not self._lacking[id_]:
                self._is_ready(id_)

    def give_up(self, failed: Unit) -> list[Unit]:
        """Those that cannot be done without a unit, in the order of the plan; they wait no more."""
        lost: dict[str, Unit] = {}
        open_ = [failed.id]
        while open_:
            for id_ in self._needing.get(open_.pop(), ()):
                if id_ in self._left:
                    lost[id_] = self._left.pop(id_)
                    open_.append(id_)
        return sorted(lost.values(), key=lambda unit: self._place[unit.id])

    def _is_ready(self, id_: str) -> None:
        heapq.heappush(self._ready.setdefault(self._model_of(self._left[id_]), []), (self._place[id_], id_))
