"""Where a picture may change: masks from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tav_opt import video
from tav_opt.config import InputError, PathLike
from tav_opt.video.containers import IMAGES, LOCAL, still

HALF = 128
"""Of 255, from which on the brightest channel says yes: PNGs with a palette have dark reds."""


def read_mask(path: PathLike) -> np.ndarray:
    """A mask bool (1 or f, H, W) from an image, for all frames, or from a video or a folder of images, one a frame.

    True, where it is white or coloured, is what may change; black is kept. Raises InputError where the file is missing
    or broken.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    single = path.suffix.lower() in IMAGES and path.is_file()
    frames = np.asarray(still(path, LOCAL))[None] if single else video.read(path).frames
    return frames.max(-1) >= HALF
