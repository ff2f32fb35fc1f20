"""What clients and a keeper of clips did, when, and whether any course of events explains every answer.

Each clip is a register, as Jepsen and Knossos call it: the keeper writes a version into it, or takes it away, one
change after the other; every answer reads it. A change takes effect at some moment between its begin and its end, an
answer shows what was there at some moment of its own; no answer that begins after another has ended may show an earlier
state (linearizability, Herlihy and Wing 1990).
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Literal

Version = str | None
"""Of a clip; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of a history; times in seconds of time.monotonic()."""

    kind: Literal["change", "edit", "cancel", "kill"]
    who: str
    began: float
    ended: float
    clip: str = ""
    outcome: str = "OK"
    """Or a gRPC status."""
    version: Version = None
    """That a change has left there."""
    settings: str = ""
    """Of an edit."""
    answer: str = ""
    """Of an edit: a hash of its frames."""


def write(events: Iterable[Event], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(f"{json.dumps(asdict(event))}\n" for event in events))


def read(path: Path) -> list[Event]:
    """The inverse of `write`."""
    return [Event(**json.loads(line)) for line in path.read_text().splitlines()]


def faults(events: Iterable[Event], versions: Callable[[Event], set[str]]) -> list[str]:
    """The answers that no course of events explains, one line each.

    `versions` tells of which versions of a clip the frames of an edit are.
    """
    events = sorted(events, key=lambda event: event.began)
    clips = sorted({event.clip for event in events} - {""})
    return [fault for clip in clips for fault in _of_clip([e for e in events if e.clip == clip], versions)]


def _of_clip(events: list[Event], versions: Callable[[Event], set[str]]) -> Iterator[str]:
    """Of one clip's events, by their begin. The earliest state that explains an answer leaves most to later ones."""
    changes = [event for event in events if event.kind == "change"]
    for one, other in pairwise(changes):
        assert one.ended <= other.began, "changes of one clip come one after the other"
    since = [-inf, *(change.began for change in changes)]
    until = [*(change.ended for change in changes), inf]
    states: list[Version] = [None, *(change.version for change in changes)]
    seen, earliest = list[tuple[float, int]](), 0
    for event in events:
        shown = _shown(event, versions)
        if shown is None:
            continue
        while seen and seen[0][0] < event.began:
            earliest = max(earliest, heapq.heappop(seen)[1])
        possible = [i for i in range(len(states)) if since[i] <= event.ended and until[i] >= event.began]
        explained = [i for i in possible if i >= earliest and states[i] in shown]
        if explained:
            heapq.heappush(seen, (event.ended, explained[0]))
        else:
            yield _told(event, shown, [states[i] for i in possible], [states[i] for i in possible if i >= earliest])


def _shown(event: Event, versions: Callable[[Event], set[str]]) -> set[Version] | None:
    """What an event shows of its clip; None where it shows nothing."""
    if event.kind != "edit":
        return None
    if event.outcome == "NOT_FOUND":
        return {None}
    return {*versions(event)} if event.outcome == "OK" else None


def _told(event: Event, shown: set[Version], possible: list[Version], left: list[Version]) -> str:
    names = [name or "no clip" for name in sorted(shown, key=str)]
    answered = f"{event.began:.3f}…{event.ended:.3f} {event.who}, clip {event.clip}, {event.settings}:"
    if not shown:
        return f"{answered} frames of no version ({event.answer[:16]})"
    there = ", ".join(name or "no clip" for name in possible)
    if shown & {*possible} and not shown & {*left}:
        return f"{answered} {' or '.join(names)}, though a later state had been seen (there was {there})"
    return f"{answered} {' or '.join(names)}, where there was {there}"
