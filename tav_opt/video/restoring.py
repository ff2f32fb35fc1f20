"""Frames that were fitted to a clip's size, back at the size and aspect of the video that they are of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from tav_opt.config import Fit

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large a video is shown, and how its frames were fitted to another size."""

    height: int
    width: int
    fit: Fit = "crop"

    def taken(self, height: int, width: int) -> Box:
        """The part of a frame (left, top, right, bottom) that is fitted to that size, about the frame's centre."""
        if self.fit == "squash":
            return 0.0, 0.0, float(self.width), float(self.height)
        scale = min(self.width / width, self.height / height)
        across, down = min(self.width, width * scale), min(self.height, height * scale)  # which rounding may exceed
        left, top = (self.width - across) / 2, (self.height - down) / 2
        return left, top, left + across, top + down


def restored(frames: np.ndarray, shape: Shape) -> np.ndarray:
    """Frames uint8 (f, H, W, 3) where they were taken of a video so shown: (f, height, width, 3), black around them."""
    count, height, width, _ = frames.shape
    left, top, right, bottom = (round(side) for side in shape.taken(height, width))
    found = np.zeros((count, shape.height, shape.width, 3), np.uint8)
    for frame, pixels in zip(found, frames, strict=True):
        picture = Image.fromarray(pixels).resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        frame[top:bottom, left:right] = np.asarray(picture)
    return found
