"""An edit that a browser waits for: told of while it waits, while it samples, and when someone cancels it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tav_opt.app.backends import Work
from tav_opt.client import Edit, Progress, ServerError

TICK_SECONDS = 1.0
CANCEL_SECONDS = 60.0
"""Within one step it has stopped; steps may be long."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """How far an edit is."""

    progress: Progress | None
    """The last step that was done; None before the first."""
    seconds: float
    """Since it began."""
    left: float | None
    """Seconds until the stage's last step, at the speed of those before."""


class EditJob:
    """One edit, read in a thread of its own so that whoever shows it can look at the clock too."""

    def __init__(self, work: Work) -> None:
        self._work, self._began = work, time.monotonic()
        self._told: queue.Queue[Progress | Edit | Exception] = queue.Queue()
        self._ended = threading.Event()
        self._progress: Progress | None = None
        self._stage_began = self._began
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for progress in self._work:
                self._told.put(progress)
            self._told.put(self._work.result())
        except Exception as error:  # raised again where it is shown
            self._told.put(error)
        finally:
            self._ended.set()

    def __iter__(self) -> Iterator[Told | Edit]:
        """What is new, at least every second; the edit comes last. Raises what the edit raises."""
        while True:
            try:
                found = self._told.get(timeout=TICK_SECONDS)
            except queue.Empty:
                yield self._now()
                continue
            if isinstance(found, Exception):
                raise found
            if isinstance(found, Edit):
                yield found
                return
            if self._progress is None or found.stage != self._progress.stage:
                # Of a stage's first step its beginning is not known to the second.
                self._stage_began = self._began if self._progress is None else time.monotonic()
            self._progress = found
            yield self._now()

    def _now(self) -> Told:
        now, progress = time.monotonic(), self._progress
        left = None
        if progress is not None and progress.step > 1:
            left = (now - self._stage_began) / progress.step * (progress.steps - progress.step)
        return Told(progress=progress, seconds=self.seconds, left=left)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def cancel(self) -> bool:
        """Stops the edit where it runs → whether it has stopped; waits for that."""
        self._work.cancel()
        return self._ended.wait(CANCEL_SECONDS)


class EditJobs:
    """The one that each browser's page waits for."""

    def __init__(self) -> None:
        self._jobs: dict[str, EditJob] = {}
        self._lock = threading.Lock()

    def begin(self, session: str, work: Work) -> EditJob:
        """In place of the one before, which is cancelled."""
        self.cancel(session)
        with self._lock:
            self._jobs[session] = job = EditJob(work)
        return job

    def end(self, session: str, job: EditJob) -> None:
        """Nobody waits for it any more; it is cancelled if it runs yet."""
        with self._lock:
            if self._jobs.get(session) is job:
                del self._jobs[session]
        job._work.cancel()

    def cancel(self, session: str) -> bool | None:
        """Stops the edit that a page waits for → whether it has stopped; None where it waits for none."""
        with self._lock:
            job = self._jobs.pop(session, None)
        return None if job is None else job.cancel()


def was_cancelled(error: Exception) -> bool:
    """Whether an edit ended so because someone asked for it."""
    return isinstance(error, ServerError) and error.status == "CANCELLED"
