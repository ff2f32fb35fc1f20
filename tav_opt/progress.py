"""How far a command is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

OnProgress = Callable[..., None]
"""Called with the stage, its steps done, its steps, and maybe the last loss."""

LINE_SECONDS = 30.0
LINE_PART = 0.1
"""A line comes after so long, or after so large a part of a stage."""


@contextmanager
def shown(*, leave: bool = True, first: str | None = None) -> Iterator[OnProgress]:
    """Shows on stderr what it is told, after a `first` line; bars go at the end of their stage unless they are left."""
    display = _Bars(leave) if sys.stderr.isatty() else _Watched(Lines())
    before = iter(() if first is None else (first,))

    def step(stage: str, step: int, steps: int, loss: float | None = None) -> None:
        for line in before:
            print(line, file=sys.stderr, flush=True)
        display.step(stage, step, steps, loss)

    try:
        yield step
    finally:
        display.end()


class Lines:
    """Progress for a log: what is new is worth a line when LINE_PART of a stage or LINE_SECONDS have passed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, stream: TextIO | None = None) -> None:
        self._clock, self._stream = clock, stream
        self._began = self._told_at = clock()
        self._stage, self._told_step = "", 0
        self._text = "no step is done yet"

    def step(self, stage: str, step: int, steps: int, loss: float | None = None) -> None:
        """A step is done."""
        if stage != self._stage:
            self._stage, self._told_step = stage, step - 1
        self._text = f"{stage}: step {step} of {steps}" + ("" if loss is None else f", loss {loss:.4f}")
        if step == steps or step - self._told_step >= LINE_PART * steps:
            self._told_step = step
            self._tell()
        else:
            self.tick()

    def tick(self) -> None:
        """Time has passed, maybe within one long step."""
        if self._clock() - self._told_at >= LINE_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told_at = self._clock()
        print(f"{self._text}, after {self._told_at - self._began:.0f} s", file=self._stream or sys.stderr, flush=True)


class _Watched:
    """Lines that come while a step lasts, too."""

    def __init__(self, lines: Lines) -> None:
        self._lines, self._lock, self._ended = lines, threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def step(self, stage: str, step: int, steps: int, loss: float | None = None) -> None:
        with self._lock:
            self._lines.step(stage, step, steps, loss)

    def end(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(1):
            with self._lock:
                self._lines.tick()


class _Bars:
    """One bar a stage."""

    def __init__(self, leave: bool) -> None:
        self._leave, self._stage = leave, ""
        self._bar: tqdm | None = None

    def step(self, stage: str, step: int, steps: int, loss: float | None = None) -> None:
        if self._bar is None or stage != self._stage:
            self.end()
            self._stage = stage
            self._bar = tqdm(total=steps, initial=step - 1, desc=stage, unit="step", leave=self._leave)
        self._bar.total = steps
        self._bar.update(step - self._bar.n)
        if loss is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
