"""People's poses by rtmlib, an ONNX network in onnxruntime, drawn as OpenPose draws them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from tav_opt.conditions.detectors import openpose
from tav_opt.config import InputError, PathLike

_INPUT = {"det_input_size": (640, 640), "pose_input_size": (192, 256)}
"""Of YOLOX and RTMPose, the networks that rtmlib takes."""
_log = logging.getLogger(__name__)


def detect(frames: np.ndarray, place: PathLike | None = None) -> np.ndarray:
    """uint8 (f, H, W, 3) → OpenPose's drawing on black of that shape.

    `place` is a folder with `det.onnx` (YOLOX) and `pose.onnx` (RTMPose); without it rtmlib fetches its own.
    """
    see, (height, width) = _detector(place), frames.shape[1:3]
    drawn = []
    for frame in frames:
        points, scores = see(np.ascontiguousarray(frame[..., ::-1]))  # it reads BGR, as OpenCV does
        points, scores = np.asarray(points, float).reshape(-1, 17, 2), np.asarray(scores, float).reshape(-1, 17)
        drawn.append(openpose.draw(*openpose.of_coco(points, scores), height, width))
    return np.stack(drawn)


def _detector(place: PathLike | None) -> Any:
    try:
        from rtmlib import Body
    except ImportError:
        raise InputError("rtmlib is not installed: pip install rtmlib; or give maps that are drawn already") from None
    if place is None:
        _log.warning("pose: rtmlib fetches its networks, some 60 MB, where they are not in its cache")
        return Body(mode="balanced", backend="onnxruntime")
    files = [Path(place) / name for name in ("det.onnx", "pose.onnx")]
    for file in files:
        if not file.is_file():
            raise InputError(f"{place} holds no {file.name}: det.onnx is YOLOX, pose.onnx RTMPose")
    return Body(det=str(files[0]), pose=str(files[1]), backend="onnxruntime", **_INPUT)
