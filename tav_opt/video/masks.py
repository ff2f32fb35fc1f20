"""Where a picture may change: masks from files, and as a file that a request brings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from tav_opt import video
from tav_opt.config import ClipConfig, InputError, PathLike
from tav_opt.video.containers import IMAGES, LOCAL, Limits, Shown, images, moving, still
from tav_opt.video.files import encode_lossless, fitted

HALF = 128
"""Of 255, from which on the brightest channel of a picture without a palette says yes."""


def read_mask(path: PathLike) -> np.ndarray:
    """A mask bool (1 or f, H, W) from an image, for all frames, or from a video or a folder of images, one a frame.

    True, where it is white or coloured, is what may change; black is kept. In pictures with a palette, as DAVIS has
    them, every colour but black is true, however dark. Raises InputError where the file is missing or broken.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.suffix.lower() in IMAGES and path.is_file():
        return np.asarray(_still(path, LOCAL))[None].max(-1) >= HALF
    if path.is_dir():
        return _frames(path, path).max(-1) >= HALF
    return video.read(path).frames.max(-1) >= HALF


def fitted_mask(path: PathLike, clip: ClipConfig) -> np.ndarray:
    """A mask of a video or a folder of images, its frames chosen and fitted as a clip's are: bool (f, H, W).

    They are black and white before they are fitted, else edges between dark colours would be lost. Raises InputError
    where it is broken, has too few frames, or leaves nothing to be kept.
    """
    path = Path(path)
    mask = _frames(path, replace(clip, video=path)).max(-1) >= HALF
    if mask.all():
        raise InputError(f"mask {path} is white all over and leaves no background to compare")
    return mask


def of_edit(path: PathLike, source: ClipConfig | None, frames: int, height: int, width: int) -> np.ndarray:
    """The mask of an edit of so many frames, fitted like its source: bool (1 or frames, height, width).

    An image, or a video of one frame, is for all frames. Of as many frames as the edit, each is of its own; of others
    those are taken that were taken of the `source`. Raises InputError where it is missing or broken, has other frames
    and nobody knows which were taken.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    own = replace(source or ClipConfig(video=path), video=path, height=height, width=width)
    whole = replace(own, frames=1, start=0, stride=1, uniform=False)
    if path.suffix.lower() in IMAGES and path.is_file():
        mask = fitted(lambda: iter([Shown(0, 1, lambda: _still(path, LOCAL))]), whole)
    elif (there := _count(path)) in (1, frames):
        mask = _frames(path, replace(whole, frames=there))
    elif source is not None:
        mask = _frames(path, replace(own, frames=frames))
    else:
        raise InputError(f"mask {path} has {there} frames: must have 1, or {frames} as the edit has")
    return mask.max(-1) >= HALF


def encoded(mask: np.ndarray) -> bytes:
    """A mask bool (f, H, W) as the video file that a request brings, without loss."""
    return encode_lossless(np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1))


def of_frames(frames: np.ndarray) -> np.ndarray:
    """The mask bool (f, H, W) that decoded frames uint8 (f, H, W, 3) show."""
    return frames.max(-1) >= HALF


def _count(path: Path) -> int:
    if path.is_dir():
        return sum(1 for _ in images(path, LOCAL))
    with path.open("rb") as file:
        return sum(1 for _ in moving(file, str(path), LOCAL))


def _frames(path: Path, clip: ClipConfig | Path) -> np.ndarray:
    if path.is_dir():
        return fitted(lambda: images(path, LOCAL, _still), clip)
    try:
        with path.open("rb") as file:
            return fitted(lambda: map(_marked, moving(file, str(path), LOCAL)), clip)
    except OSError as error:
        raise InputError(f"mask {path} cannot be read: {error.strerror}") from None


def _marked(shown: Shown) -> Shown:
    return replace(shown, picture=lambda: _black_and_white(shown.picture(), HALF))


def _still(path: Path, limits: Limits) -> Image.Image:
    picture = still(path, limits)
    with Image.open(path) as file:
        return _black_and_white(picture, 1 if file.mode == "P" else HALF)


def _black_and_white(picture: Image.Image, least: int) -> Image.Image:
    """RGB, white where the brightest channel is `least` or more."""
    white = np.asarray(picture).max(-1, keepdims=True) >= least
    return Image.fromarray(np.repeat(white * np.uint8(255), 3, axis=-1))
