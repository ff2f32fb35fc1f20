"""Whether points of an edit move as the source's do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from tav_opt.metrics.left_out import LeftOut, library

GRID = 16
"""Points a side."""
WINDOW = 15
"""Pixels of a side of what is looked for again; smaller pictures have smaller windows."""
STRAYED = 1.0
"""Pixels between a point and where its way there and back ends, beyond which it is lost."""
STILL = 0.1
"""Pixels a frame, root mean square, below which a source does not move: encoders and trackers tremble by as much."""


def motion_fidelity(edit: np.ndarray, source: np.ndarray) -> float:
    """Correlation of the displacements of the same points in edit and source, both uint8 (f, H, W, 3), −1…1.

    Σ d·d′ / √(Σ|d|² Σ|d′|²) over all points of a grid and all neighbouring frames, while a point is tracked in both: 1
    where the edit moves as the source does, −1 where it moves the other way, 0 where it stays still. After the motion
    fidelity score of Yatim et al. 2023 (arXiv 2311.17009), which differs: it tracks by CoTracker, takes for each point
    the track that is most like it, and counts a trembling point as much as a running one. Here the tracks are OpenCV's
    pyramidal Lucas-Kanade. Raises LeftOut where the source does not move, or no point can be tracked in both.
    """
    moved, expected = displacements(edit), displacements(source)
    both = np.isfinite(moved).all(-1) & np.isfinite(expected).all(-1)
    if not both.any():
        raise LeftOut("needs a point that can be tracked in edit and source")
    moved, expected = moved[both].astype(np.float64), expected[both].astype(np.float64)
    if (speed := np.sqrt((expected**2).sum(-1).mean())) < STILL:
        raise LeftOut(f"needs a source that moves: its points move by {speed:.2g} pixels a frame")
    return float((moved * expected).sum() / max(np.sqrt((moved**2).sum() * (expected**2).sum()), 1e-9))


def displacements(frames: np.ndarray) -> np.ndarray:
    """How points of a grid move from frame to frame: float32 (points, f-1, 2), x and y in pixels, NaN once lost.

    Raises LeftOut for one frame, and where OpenCV is not installed.
    """
    cv2 = library("cv2", "OpenCV")
    if len(frames) < 2:
        raise LeftOut(f"needs two frames or more, not {len(frames)}")
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    points, found = _grid(*grey[0].shape), []
    for first, second in pairwise(grey):
        after = _followed(cv2, first, second, points)
        found.append(after - points)
        points = after
    return np.stack(found, 1)


def _grid(height: int, width: int) -> np.ndarray:
    """Middles of the cells of a grid (points, 2), x and y."""
    x, y = ((np.arange(GRID, dtype=np.float32) + 0.5) * side / GRID - 0.5 for side in (width, height))
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def _followed(cv2: Any, first: np.ndarray, second: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Where points (n, 2) of a frame are in the next; NaN for those that are lost."""
    height, width = first.shape
    there, back = points.copy(), points.copy()
    known = np.isfinite(points).all(-1)
    options = {"winSize": (min(WINDOW, width), min(WINDOW, height))}
    track = cv2.calcOpticalFlowPyrLK
    if known.any():
        there[known], seen, _ = track(first, second, points[known], None, **options)
        back[known], again, _ = track(second, first, there[known], None, **options)
        known[known] = (seen & again).ravel().astype(bool)
    within = ((there >= 0) & (there <= np.array([width - 1, height - 1]))).all(-1)
    kept = known & within & (np.linalg.norm(back - points, axis=-1) <= STRAYED)
    return np.where(kept[:, None], there, np.nan).astype(np.float32)
