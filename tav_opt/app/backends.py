"""Who edits: a running server, or the server's own editor in this process; the page sees no difference."""

from __future__ import annotations

import json
import queue
import threading
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tav_opt.app.app_config import AppConfig
from tav_opt.client import Client, Edit, Options, Progress, Retry, ServerError
from tav_opt.client.exchange import control_videos
from tav_opt.config import EditConfig, InputError
from tav_opt.contract import ServedClip, to_tensors
from tav_opt.loopback import urlopen
from tav_opt.repository import clips as exported
from tav_opt.repository.layout import find_clip, info_of, version_folder
from tav_opt.serving.host import probe

if TYPE_CHECKING:
    from tav_opt.serving.edits import Editor

PENDING = "nv_inference_pending_request_count"


class Work(Protocol):
    """An edit under way: an iterator of its progress; then `result()`. Left or cancelled, it stops within a step."""

    def __iter__(self) -> Iterator[Progress]: ...
    def result(self) -> Edit: ...
    def cancel(self) -> None:
        """From any thread."""


class Backend(Protocol):
    """Who edits."""

    def clip(self, name: str) -> ServedClip:
        """What a clip takes; raises InputError for one that is not there."""

    def begin(self, clip: str, edit: EditConfig, options: Options) -> Work:
        """Begins an edit; raises InputError for what cannot be sent."""

    def waiting(self) -> int | None:
        """How many requests wait for a worker; None where nobody tells."""

    def health(self) -> tuple[str, str]:
        """alive, busy or dead; and how that is known."""

    def close(self) -> None:
        """Cancels what runs."""


def open_backend(config: AppConfig) -> Backend:
    """The one that is asked for."""
    return InProcess(config) if config.in_process else Remote(config)


def served(config: AppConfig) -> list[str] | None:
    """Names of the clips that were named, or else of those that the server tells of; None where nobody does."""
    if config.clips:
        return list(config.clips)
    if not config.in_process:
        with Client(config.url, retry=Retry(attempts=1)) as client, suppress(ServerError, InputError):
            return list(client.clips(deadline_s=5))
    return None


def names(config: AppConfig) -> list[str]:
    """Of the clips that are offered: those that the server has, which may be on another repository than the page."""
    found = served(config)
    if found is None and version_folder(config.repository).is_dir():
        found = [clip.name for clip in exported.clips(config.repository, on_damaged=lambda *_: None)]
    return found or []


class Remote:
    """A server, over gRPC."""

    def __init__(self, config: AppConfig) -> None:
        self._client = Client(config.url, retry=Retry(attempts=3))
        self._metrics_url = config.metrics_url

    def clip(self, name: str) -> ServedClip:
        return self._client.clip(name)

    def begin(self, clip: str, edit: EditConfig, options: Options) -> Work:
        return self._client.stream(clip, edit, **options)

    def waiting(self) -> int | None:
        try:
            with urlopen(self._metrics_url, 2) as page:
                lines = page.read().decode().splitlines()
        except (OSError, ValueError, urllib.error.URLError):
            return None
        found = [line.rpartition(" ")[2] for line in lines if line.startswith(PENDING) and "_stream" in line]
        return int(sum(map(float, found)))

    def health(self) -> tuple[str, str]:
        found = probe.told(self._metrics_url)
        if found.state == "dead" and self._client.is_live():
            return "busy", f"the server answers over gRPC; {found.reason} (--metrics-url)"
        return found.state, found.reason

    def close(self) -> None:
        self._client.close()


class InProcess:
    """The editor of the server's worker, in this process: opened with the first edit, one edit at a time."""

    def __init__(self, config: AppConfig) -> None:
        self._config, self._lock = config, threading.Lock()
        self._editor: Editor | None = None
        self._running: set[_Local] = set()

    def clip(self, name: str) -> ServedClip:
        info = info_of(find_clip(self._config.repository, name))
        return ServedClip(**{field: getattr(info, field) for field in ServedClip.__dataclass_fields__})

    def begin(self, clip: str, edit: EditConfig, options: Options) -> Work:
        asked: dict[str, Any] = {name: value for name, value in options.items() if name not in ("sound", "deadline_s")}
        asked["control_videos"] = control_videos(edit, asked.pop("maps", {}))
        fps = asked.get("fps") or self.clip(clip).fps
        return _Local(to_tensors(clip, edit, **asked), fps, self._answer)

    def _answer(self, tensors: dict[str, np.ndarray], send: Callable[..., None], stop: threading.Event) -> Any:
        from tav_opt.ddim import Stopped
        from tav_opt.serving.report import Report

        def go_on() -> None:
            if stop.is_set():
                raise Stopped

        while not self._lock.acquire(timeout=0.2):
            go_on()
        try:
            return self._opened().answer(tensors, send, go_on, Report())
        finally:
            self._lock.release()

    def _opened(self) -> Editor:
        if self._editor is None:
            from tav_opt.engines.registry import best_device
            from tav_opt.serving.opening import open_editor

            folder = version_folder(self._config.repository)
            self._editor, _ = open_editor(folder, self._config.worker, device=best_device())
        return self._editor

    def waiting(self) -> int | None:
        return None

    def health(self) -> tuple[str, str]:
        if self._lock.locked():
            return "busy", "an edit runs in this process"
        return "alive", "edits run in this process" + ("" if self._editor else "; the first one opens its clip")

    def close(self) -> None:
        pass  # its threads are daemons


@dataclass(frozen=True)
class _Failed:
    error: Exception


class _Local:
    """An edit in a thread of this process, told of as a client's stream tells."""

    def __init__(self, tensors: dict[str, np.ndarray], fps: float, answer: Callable[..., Any]) -> None:
        self._told: queue.Queue[Progress | Edit | _Failed] = queue.Queue()
        self._stop, self._fps = threading.Event(), fps
        self._edit: Edit | None = None
        self._parts: list[np.ndarray] = []
        """Frames (prompts, f, H, W, 3) of a large result, which come before its last response."""
        threading.Thread(target=self._run, args=(tensors, answer), daemon=True).start()

    def _run(self, tensors: dict[str, np.ndarray], answer: Callable[..., Any]) -> None:
        from tav_opt.ddim import Stopped

        try:
            last = answer(tensors, self._send, self._stop)
        except Stopped:
            self._told.put(_Failed(ServerError("the edit was cancelled", "CANCELLED")))
        except Exception as error:  # whatever a request does, the page goes on
            self._told.put(_Failed(error))
        else:
            about = tuple(map(json.loads, last["metadata"]))
            frames = np.concatenate(self._parts, axis=1) if self._parts else last["frames"]
            self._told.put(Edit(frames=frames, fps=self._fps, metadata=about))

    def _send(self, told: dict[str, np.ndarray]) -> None:
        stage, step, steps = (told[name][0] for name in ("stage", "step", "steps"))
        preview = told.get("preview")
        if "frames" in told:
            self._parts.append(told["frames"])
        self._told.put(Progress(stage=stage.decode(), step=int(step), steps=int(steps), preview=preview))

    def __iter__(self) -> Iterator[Progress]:
        while self._edit is None:
            match self._told.get():
                case Progress() as progress:
                    yield progress
                case Edit() as edit:
                    self._edit = edit
                case _Failed(error):
                    raise error

    def result(self) -> Edit:
        for _ in self:
            pass
        assert self._edit is not None
        return self._edit

    def cancel(self) -> None:
        self._stop.set()
