"""OpenCV, which is optional."""

from __future__ import annotations

from typing import Any

from tav_opt.config import InputError


def load() -> Any:
    """The module; raises InputError where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise InputError("OpenCV is not installed: pip install 'tav-opt[detect]'") from None
    return cv2
