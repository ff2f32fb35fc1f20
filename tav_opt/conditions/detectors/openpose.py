"""OpenPose's drawing of people, as ControlNet was trained on: 18 points, 17 limbs, their published colours, widths."""

from __future__ import annotations

import math

import numpy as np

from tav_opt.conditions.detectors import opencv

POINTS = (
    "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
    "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle", "right eye", "left eye",
    "right ear", "left ear",
)  # fmt: skip
"""OpenPose's COCO model, in its order."""
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
"""Of the points, RGB; limb i has that of point i, at LIMB of its brightness."""
LIMB = 0.6
HALF_WIDTH = 4
"""Pixels, of a limb's ellipse and of a point's disc."""
_COCO = (0, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
"""COCO's 17 points in OpenPose's order, which has the neck, between the shoulders, in second place."""
_SHOULDERS = (5, 6)


def of_coco(points: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(people, 17, 2) and (people, 17) as COCO orders them → (people, 18, 2) and (people, 18) as OpenPose does."""
    neck = points[:, _SHOULDERS].mean(1, keepdims=True)
    seen = scores[:, _SHOULDERS].min(1, keepdims=True)
    order = [*_COCO]
    return (
        np.concatenate([points[:, order[:1]], neck, points[:, order[1:]]], axis=1),
        np.concatenate([scores[:, order[:1]], seen, scores[:, order[1:]]], axis=1),
    )


def draw(points: np.ndarray, scores: np.ndarray, height: int, width: int, least: float = 0.3) -> np.ndarray:
    """points (people, 18, 2) in pixels x, y and their scores (people, 18) → uint8 (H, W, 3) RGB on black.

    What has a score below `least` is not drawn.
    """
    canvas = np.zeros((height, width, 3), np.uint8)
    seen = scores >= least
    for person, there in zip(points, seen, strict=True):
        for number, (start, end) in enumerate(LIMBS):
            if there[start] and there[end]:
                _limb(canvas, person[start], person[end], COLOURS[number])
    for person, there in zip(points, seen, strict=True):
        for point in np.flatnonzero(there).tolist():
            x, y = (round(float(value)) for value in person[point])
            opencv.load().circle(canvas, (x, y), HALF_WIDTH, COLOURS[point], thickness=-1)
    return canvas


def _limb(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, colour: tuple[int, int, int]) -> None:
    cv2 = opencv.load()
    x, y = (int(value) for value in (start + end) / 2)
    length = float(np.hypot(*(end - start)))
    angle = int(math.degrees(math.atan2(end[1] - start[1], end[0] - start[0])))
    ellipse = cv2.ellipse2Poly((x, y), (int(length / 2), HALF_WIDTH), angle, 0, 360, 1)
    cv2.fillConvexPoly(canvas, ellipse, [int(LIMB * value) for value in colour])
