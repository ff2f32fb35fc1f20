"""Where a picture may change: masks from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from tav_opt import video
from tav_opt.config import ClipConfig, InputError, PathLike
from tav_opt.video.containers import IMAGES, LOCAL, Limits, Shown, images, moving, still
from tav_opt.video.files import fitted

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
