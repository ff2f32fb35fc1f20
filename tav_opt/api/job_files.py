"""The files of jobs: what was uploaded, and what was made of it; every name here is ours."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

from tav_opt import video
from tav_opt.api.jobs import Outcome
from tav_opt.client import Edit
from tav_opt.config import InputError
from tav_opt.files import discard, whole
from tav_opt.video.contact_sheet import contact_sheet
from tav_opt.video.containers import LOCAL

Variant = Literal["video", "thumbnail", "spritesheet"]
"""As OpenAI names them."""
FILES: Mapping[Variant, tuple[str, str]] = {
    "video": ("video.mp4", "video/mp4"),
    "thumbnail": ("thumbnail.png", "image/png"),
    "spritesheet": ("spritesheet.png", "image/png"),
}
"""Name and type of each."""
_RESULT, _OUTCOME = "result", "outcome.json"


class JobFiles:
    """A folder with one of each job in it, which another API does not work on meanwhile."""

    def __init__(self, folder: Path) -> None:
        """Makes it; raises InputError where that cannot be, or another API has it."""
        self._folder = folder / "videos"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(f"{folder} is in use by another tav-opt api: choose another with --jobs") from None

    def close(self) -> None:
        os.close(self._lock)

    def keep(self, job_id: str, name: str, upload: IO[bytes]) -> None:
        """An uploaded file, by the name of its field."""
        with whole(self.upload(job_id, name)) as beside, beside.open("wb") as file:
            upload.seek(0)
            shutil.copyfileobj(upload, file)

    def reuse(self, job_id: str, name: str, made: str) -> None:
        """The video of another job in an upload's place; raises InputError where it has gone."""
        source = self.path(made, "video")
        if source is None:
            raise InputError(f"{name}: {made} is removed")
        with source.open("rb") as file:
            self.keep(job_id, name, file)

    def upload(self, job_id: str, name: str) -> Path:
        """Where it lies."""
        return self._folder / job_id / f"{name}.upload"

    def store(self, job_id: str, edit: Edit, caption: str) -> Outcome:
        """The server's video with its pictures, all or nothing, a sheet with a caption; the uploads go."""
        (mp4,) = edit.videos
        frames = video.decode(mp4, LOCAL).frames
        height, width = frames.shape[1:3]
        told = {"seconds": f"{round(len(frames) / edit.fps, 3):g}", "size": f"{width}x{height}"}
        with whole(self._folder / job_id / _RESULT) as folder:
            folder.mkdir()
            (folder / FILES["video"][0]).write_bytes(mp4)
            video.write_png(folder / FILES["thumbnail"][0], frames[len(frames) // 2])
            video.write_png(folder / FILES["spritesheet"][0], contact_sheet([frames], [caption]))
            (folder / _OUTCOME).write_text(json.dumps(told | {"settings": edit.metadata[0]}))
        for upload in (self._folder / job_id).glob("*.upload"):
            upload.unlink()
        found = self.stored(job_id)
        assert found is not None
        return found

    def stored(self, job_id: str) -> Outcome | None:
        """What is known of a video that is whole on the disk."""
        path = self._folder / job_id / _RESULT / _OUTCOME
        if not path.is_file():
            return None
        told: dict[str, Any] = json.loads(path.read_text())
        return Outcome(**told, bytes=sum(file.stat().st_size for file in path.parent.iterdir()))

    def path(self, job_id: str, variant: Variant) -> Path | None:
        """Where a file of a finished job lies; None where it has gone."""
        path = self._folder / job_id / _RESULT / FILES[variant][0]
        return path if path.is_file() else None

    def remove(self, job_id: str) -> None:
        discard(self._folder / job_id)

    def sweep(self, known: set[str]) -> None:
        """Removes the folders of jobs that there are no more: a process ended between the two."""
        for folder in self._folder.iterdir():
            if folder.name not in known:
                discard(folder)
