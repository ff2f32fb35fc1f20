"""Clips that are tuned from the page: each in a process and a folder of its own, which says how far it is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tav_opt.app.tuner import CHECKPOINT, EVENTS, RUN
from tav_opt.clip_folder import ClipFolder
from tav_opt.config import InputError
from tav_opt.contract import check_clip_name
from tav_opt.files import read_object, whole, write_json

State = Literal["running", "stopped", "failed", "done"]
STOP_SECONDS = 120.0
"""A step may be long."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """How far a run is."""

    state: State
    stage: str = ""
    step: int = 0
    steps: int = 0
    losses: tuple[tuple[int, float], ...] = ()
    """Of the steps that were done, by number."""
    left: float | None = None
    """Seconds until the stage's last step."""
    error: str = ""


class TuningRuns:
    """All of a folder; those that run end with it, and keep their state."""

    def __init__(self, folder: Path, shown: Path) -> None:
        self._folder, self.shown, self._lock = folder.absolute(), shown.absolute(), threading.Lock()
        self.shown.mkdir(parents=True, exist_ok=True)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def names(self) -> list[str]:
        """Newest first."""
        found = [path.parent for path in self._folder.glob(f"*/{RUN}")]
        return [path.name for path in sorted(found, key=lambda path: (path / RUN).stat().st_mtime, reverse=True)]

    def folder(self, name: str) -> Path:
        """Of a run; raises InputError for what is no name."""
        return self._folder / check_clip_name(name)

    def asked(self, name: str) -> dict[str, Any]:
        """What a run was told."""
        return read_object(self.folder(name) / RUN)

    def begin(self, name: str, video: Path, asked: Mapping[str, Any]) -> None:
        """Begins a run, whose video is kept with it.

        Raises InputError for a name that is taken: `go_on` goes on with a run.
        """
        folder = self.folder(name)
        if (folder / RUN).exists():
            raise InputError(f"{name!r} was tuned already: choose another name, or go on with that run")
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f"source{video.suffix.lower()}"
        shutil.copyfile(video, own)
        write_json(folder / RUN, {**asked, "clip": {**asked["clip"], "video": str(own)}})
        self._start(name)

    def go_on(self, name: str) -> None:
        """Goes on with a run that was stopped, as it was told; raises InputError for one that runs or is done."""
        told = self.told(name)
        if told.state in ("running", "done"):
            raise InputError(f"{name!r} is {told.state}: there is nothing to go on with")
        self._start(name)

    def _start(self, name: str) -> None:
        folder = self.folder(name)
        with self._lock, (folder / "log.txt").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", "tav_opt.app.tuner", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the page, which stops its runs itself
            )

    def stop(self, name: str) -> bool:
        """Stops a run after its present step → whether it has ended; waits for that."""
        with self._lock:
            process = self._running.get(name)
        if process is None or process.poll() is not None:
            return True
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Stops all that run."""
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        for process in self._running.values():
            process.wait()

    def is_running(self, name: str) -> bool:
        """Whether this page's process tunes it now."""
        process = self._running.get(name)
        return process is not None and process.poll() is None

    def told(self, name: str) -> Told:
        """How far a run is, by what it wrote."""
        running, folder = self.is_running(name), self.folder(name)
        events = _events(folder / EVENTS)
        since = max((n for n, event in enumerate(events) if event.get("event") == "begun"), default=0)
        steps = [event for event in events[since:] if "step" in event]
        losses = {event["step"]: event["loss"] for event in events if event.get("stage") == "tune"}
        last: Mapping[str, Any] = steps[-1] if steps else {}
        ends = {event["event"]: event.get("error", "") for event in events[since:] if "event" in event}
        state: State = "running" if running else "stopped"
        if not running and "failed" in ends:
            state = "failed"
        elif not running and ClipFolder.found(folder / CHECKPOINT) is not None:
            state = "done"
        return Told(
            state=state,
            stage=str(last.get("stage", "")),
            step=last.get("step", max(losses, default=0)),
            steps=last.get("steps", 0),
            losses=tuple(sorted(losses.items())),
            left=_left([event for event in steps if event["stage"] == last.get("stage")]),
            error=ends.get("failed", ""),
        )

    def previews(self, name: str) -> list[Path]:
        """Pictures that the run has drawn, newest first: copies in `shown`, for the checkpoint is nobody's to fetch."""
        found = []
        for path in sorted((self.folder(name) / CHECKPOINT / "previews").glob("step-*.png"), reverse=True):
            copy = self.shown / f"{name}-{path.stat().st_mtime_ns}-{path.name}"
            if not copy.exists():
                with whole(copy) as beside:
                    shutil.copyfile(path, beside)
            found.append(copy)
        return found


def _events(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # being written
            continue
    return found


def _left(steps: list[dict[str, Any]]) -> float | None:
    if len(steps) < 2:
        return None
    first, last = steps[max(0, len(steps) - 50)], steps[-1]
    pace = (last["at"] - first["at"]) / max(1, last["step"] - first["step"])
    return pace * (last["steps"] - last["step"])
