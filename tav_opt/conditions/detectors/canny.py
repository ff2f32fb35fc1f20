"""Edges by Canny's detector (OpenCV), with the thresholds that ControlNet's authors drew their maps with."""

from __future__ import annotations

import numpy as np

from tav_opt.conditions.detectors import opencv
from tav_opt.config import InputError, PathLike

LOW, HIGH = 100, 200


def detect(frames: np.ndarray, place: PathLike | None = None) -> np.ndarray:
    """uint8 (f, H, W, 3) → white edges on black of that shape; it has no network."""
    if place is not None:
        raise InputError(f"canny has no network, but {place} was given")
    cv2 = opencv.load()
    edges = [cv2.Canny(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), LOW, HIGH) for frame in frames]
    return np.repeat(np.stack(edges)[..., None], 3, axis=-1)
