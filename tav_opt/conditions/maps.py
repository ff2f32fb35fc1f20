"""Maps as people have them: a video or a folder of images, fitted to the clip as its source was."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tav_opt import video
from tav_opt.config import ClipConfig, Fit, InputError


def read_maps(
    path: Path, frames: int, height: int, width: int, stride: int | None = None, fit: Fit = ClipConfig.fit
) -> np.ndarray:
    """uint8 (f, H, W, 3): every frame, which must be as many, or every `stride`-th.

    Raises InputError as `video.read` does, and where there are more.
    """
    clip = ClipConfig(video=path, start=0, stride=stride or 1, frames=frames, height=height, width=width, fit=fit)
    found = video.read(clip).frames
    if stride is None and _has(path, frames + 1):
        raise InputError(
            f"{path} has more than {frames} frames, as many as the clip has: give every how manieth to take"
        )
    return found


def _has(path: Path, frames: int) -> bool:
    try:
        video.read(ClipConfig(video=path, start=0, stride=1, frames=frames, height=8, width=8))
    except InputError:
        return False
    return True
