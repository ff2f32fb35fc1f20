"""A video in a clip's place, and a mask: frames chosen and cut to the clip's size here, as `tune` does; then sent."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tav_opt.client.exchange import Options
from tav_opt.config import ClipConfig, InputError
from tav_opt.contract import ServedClip, same_speed

if TYPE_CHECKING:
    from tav_opt.video import Clip

FITTING = ("frames", "start", "stride", "uniform", "fit")
"""Options that mean what they mean in ClipConfig."""


class Files(NamedTuple):
    """What is fitted here before it is sent."""

    video: Path | None
    mask: Path | None


def files_of(options: Options) -> Files | None:
    """The files or folders to fit, where some are given; None for bytes, which are sent as they are, and for none.

    Raises InputError for a path where nothing is, another kind of value, options of fitting without a video's path, and
    a mask to be fitted to bytes.
    """
    files = Files(*(_path_of(name, options.get(name)) for name in ("video", "mask")))
    if files.video is None and (given := [name for name in FITTING if name in options]):
        raise InputError(f"{given[0]} chooses frames of a video that is given as a path; there is none")
    if files.mask is not None and isinstance(options.get("video"), bytes):
        raise InputError(f"{files.mask}: a mask's file is fitted to a video's; beside its bytes give the mask's bytes")
    return files if any(files) else None


def _path_of(name: str, value: Any) -> Path | None:
    if isinstance(value, str | os.PathLike):
        path = Path(value)
        if not path.exists():
            raise InputError(f"{path} does not exist")
        return path
    if value is not None and not isinstance(value, bytes):
        raise InputError(f"{name} is {type(value).__name__}: must be a path, or the bytes of a file")
    return None


def fitted(
    options: Options, video: Path | None, clip: ServedClip, *, mask: Path | None = None, began: float
) -> Options:
    """The options with frames of `video` and `mask` in place of the files, of the clip's size; the video's speed.

    There are as many as the clip has unless the options say how many. The deadline counts from `began`
    (time.monotonic). Raises InputError as `video.read` and `video.masks.of_edit` do.
    """
    left = options.copy()
    for name in ("video", "mask", *FITTING):
        left.pop(name, None)  # type: ignore[misc]
    config = None if video is None else _config(options, video, clip)
    if config is not None:
        from tav_opt import video as videos  # av and Pillow are not needed elsewhere in the client

        left = in_place(left, videos.read(config), clip)
    if mask is not None:
        from tav_opt.video import masks

        count = len(left["source_frames"]) if "source_frames" in left else clip.frames
        left["mask"] = masks.encoded(masks.of_edit(mask, config, count, clip.height, clip.width))
    elif isinstance(options.get("mask"), bytes):
        left["mask"] = options["mask"]
    if (deadline_s := left.get("deadline_s")) is not None:
        left["deadline_s"] = max(deadline_s - (time.monotonic() - began), 1e-3)
    return left


def _config(options: Options, path: Path, clip: ServedClip) -> ClipConfig:
    given: dict[str, Any] = {name: options[name] for name in FITTING if name in options}  # type: ignore[literal-required]
    if given.get("frames") is None:
        given["frames"] = clip.frames
    return ClipConfig(video=path, height=clip.height, width=clip.width, **given)


def in_place(options: Options, source: Clip, clip: ServedClip) -> Options:
    """The options with a source that is fitted already in place of the clip; its speed and sound, unless others are."""
    placed = options.copy()
    placed["source_frames"] = source.frames
    if same_speed(placed.get("fps"), source.fps):
        placed["fps"] = None if same_speed(source.fps, clip.fps) else source.fps  # servers of before know none
        placed.setdefault("sound", source.sound)
    return placed
