"""Results as files that the page plays and offers, in a folder that keeps the newest of them."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tav_opt import video
from tav_opt.client import Edit
from tav_opt.video import Clip, contact_sheet

KINDS = ("mp4", "gif", "png")
"""What each edit can be had as; the PNG is a sheet of its frames under the source's."""


@dataclass(frozen=True)
class Kept:
    """The files of one edit; its name cannot be guessed."""

    folder: Path
    number: int

    @property
    def key(self) -> str:
        """What a browser remembers of it."""
        return f"{self.folder.name}/{self.number}"

    def path(self, kind: str) -> Path:
        """Of one of KINDS."""
        return self.folder / f"edit-{self.number}.{kind}"

    @property
    def source(self) -> Path | None:
        """The video that was edited; None where nobody here knows it."""
        path = self.folder / "source.mp4"
        return path if path.is_file() else None


class KeptResults:
    """At most so many bytes of them; the oldest go first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit, self._lock = folder.absolute(), limit, threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, edit: Edit, prompts: Sequence[str], source: Clip | None, caption: str) -> list[Kept]:
        """Writes one edit of each prompt; the MP4 has the source's sound where it has its speed."""
        folder = self.folder / secrets.token_hex(12)
        found = [Kept(folder, number) for number in range(1, len(edit.frames) + 1)]
        sound = source.sound if source is not None and abs(source.fps - edit.fps) < 1e-3 else None
        if source is not None:
            video.write(folder / "source.mp4", source.frames, edit.fps)
        for kept, frames, about, prompt in zip(found, edit.frames, edit.metadata, prompts, strict=True):
            video.write(kept.path("mp4"), frames, edit.fps, about, sound=sound)
            video.write(kept.path("gif"), frames, edit.fps, about)
            rows = [frames] if source is None else [source.frames, frames]
            captions = [prompt] if source is None else [caption, prompt]
            video.write_png(kept.path("png"), contact_sheet.contact_sheet(rows, captions), about)
        self._sweep(folder)
        return found

    def find(self, key: str) -> Kept | None:
        """The edit that a browser remembers; None where it is not kept any more."""
        name, _, number = key.partition("/")
        if not (name.isalnum() and number.isdigit()):
            return None
        found = Kept(self.folder / name, int(number))
        return found if found.path("mp4").is_file() else None

    def _sweep(self, newest: Path) -> None:
        with self._lock:
            folders = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
            total = 0
            for folder in folders:
                total += sum(path.stat().st_size for path in folder.iterdir())
                if total > self._limit and folder != newest:
                    shutil.rmtree(folder, ignore_errors=True)
