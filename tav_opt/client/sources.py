"""A video in a clip's place: its frames chosen and cut to the clip's size here, as `tune` does, and then sent."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_opt.client.exchange import Options
from tav_opt.config import ClipConfig, InputError
from tav_opt.contract import ServedClip, same_speed

if TYPE_CHECKING:
    from tav_opt.video import Clip

FITTING = ("start", "stride", "uniform", "fit")
"""Options that mean what they mean in ClipConfig."""


def path_of(options: Options) -> Path | None:
    """The file or folder to fit, where one is given; None for bytes, which are sent as they are, and for no video.

    Raises InputError for a path where nothing is, another kind of value, and options of fitting without a path.
    """
    video = options.get("video")
    if isinstance(video, str | os.PathLike):
        path = Path(video)
        if not path.exists():
            raise InputError(f"{path} does not exist")
        return path
    if video is not None and not isinstance(video, bytes):
        raise InputError(f"video is {type(video).__name__}: must be a path, or the bytes of a file")
    if given := [name for name in FITTING if name in options]:
        raise InputError(f"{given[0]} chooses frames of a video that is given as a path; there is none")
    return None


def fitted(options: Options, path: Path, clip: ServedClip, *, began: float) -> Options:
    """The options with frames of `path` in place of the video, as many and as large as the clip's; its speed and sound.

    The deadline counts from `began` (time.monotonic). Raises InputError as `video.read` does.
    """
    from tav_opt import video  # av and Pillow are not needed elsewhere in the client

    given: dict[str, Any] = {name: options[name] for name in FITTING if name in options}  # type: ignore[literal-required]
    source = video.read(ClipConfig(video=path, frames=clip.frames, height=clip.height, width=clip.width, **given))
    left = options.copy()
    for name in ("video", *FITTING):
        left.pop(name, None)  # type: ignore[misc]
    if (deadline_s := left.get("deadline_s")) is not None:
        left["deadline_s"] = max(deadline_s - (time.monotonic() - began), 1e-3)
    return in_place(left, source, clip)


def in_place(options: Options, source: Clip, clip: ServedClip) -> Options:
    """The options with a source that is fitted already in place of the clip; its speed and sound, unless others are."""
    placed = options.copy()
    placed["source_frames"] = source.frames
    if same_speed(placed.get("fps"), source.fps):
        placed["fps"] = None if same_speed(source.fps, clip.fps) else source.fps  # servers of before know none
        placed.setdefault("sound", source.sound)
    return placed
