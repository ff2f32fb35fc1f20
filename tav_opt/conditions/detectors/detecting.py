"""Maps of a kind, seen by its detector in the frames of a video."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np

from tav_opt.config import InputError, PathLike

KINDS = {
    "canny": "edges by OpenCV",
    "depth": "near is bright, by a depth-estimation network of transformers",
    "softedge": "soft edges by HED",
    "pose": "OpenPose's drawing of people, seen by rtmlib",
}
"""What can be detected; maps of any other kind can be given."""
Detector = Callable[[np.ndarray, PathLike | None], np.ndarray]
"""uint8 frames (f, H, W, 3), where its network is (None: the usual one, from the hub) → uint8 maps of that shape."""


def detect(kind: str, frames: np.ndarray, place: PathLike | None = None) -> np.ndarray:
    """uint8 frames (f, H, W, 3) → uint8 maps (f, H, W, 3) of a kind; raises InputError, saying what is missing."""
    detector: Detector = import_module(f"tav_opt.conditions.detectors.{check_kind(kind)}").detect
    return detector(frames, place)


def check_kind(kind: str) -> str:
    """The kind itself; raises InputError where nothing detects it."""
    if kind not in KINDS:
        raise InputError(f"nothing detects {kind!r}; there are {', '.join(KINDS)}: give maps of it instead")
    return kind
