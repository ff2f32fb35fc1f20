"""Maps for the demo's adapter: where the subject shall be, as drawn ellipses that wander over the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Way = Callable[[float], tuple[float, float]]
"""Part of the clip, 0…1 → the ellipse's middle, x and y as parts of the side."""
SIZE = 0.56, 0.5
"""Width and height of the ellipse as parts of the side, as large as the clips' subjects are."""
WAYS: dict[str, Way] = {
    "back": lambda part: (0.33 + 0.34 * part, 0.64),
    "there and back": lambda part: (0.36 + 0.28 * math.sin(math.pi * part), 0.64),
    "hop": lambda part: (0.5, 0.66 - 0.16 * abs(math.sin(2 * math.pi * part))),
    "to and fro": lambda part: (0.5 - 0.15 * math.cos(3 * math.pi * part), 0.62),
    "bounce": lambda part: (0.35 + 0.3 * part, 0.66 - 0.16 * abs(math.sin(3 * math.pi * part))),
    "circle": lambda part: (0.5 - 0.15 * math.cos(2 * math.pi * part), 0.58 + 0.08 * math.sin(2 * math.pi * part)),
}
"""Where no clip of the package goes: they all cross from right to left."""


def along(way: Way, frames: int, side: int) -> np.ndarray:
    """Maps uint8 (f, side, side, 3) of an ellipse on its way."""
    drawn = [ellipse_at(way(number / max(1, frames - 1)), SIZE, side) for number in range(frames)]
    return np.stack(drawn)[..., None].repeat(3, -1)


def middles(maps: np.ndarray) -> np.ndarray:
    """Of the bright part's box in each map uint8 (f, H, W, 3): (f, 2), x and y in pixels."""
    boxes = [_box(one.max(-1)) for one in maps]
    return np.array([((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in boxes])


def ellipse(silhouette: np.ndarray) -> np.ndarray:
    """uint8 (H, W) → the ellipse in its box; nothing of nothing."""
    return _drawn(_box(silhouette), len(silhouette)) if (silhouette > 127).any() else silhouette


def ellipse_at(middle: Sequence[float], size: Sequence[float], side: int) -> np.ndarray:
    """A map uint8 (side, side) with one ellipse; middle and size, x before y, as parts of the side."""
    (x, y), (width, height) = middle, size
    return _drawn([side * at for at in (x - width / 2, y - height / 2, x + width / 2, y + height / 2)], side)


def _box(silhouette: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = (np.flatnonzero((silhouette > 127).any(axis)) for axis in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])


def _drawn(box: Sequence[float], side: int) -> np.ndarray:
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).ellipse(list(box), fill=255)
    return np.asarray(picture)
