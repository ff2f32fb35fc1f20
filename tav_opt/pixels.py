"""Frames as files and the wire have them, and as networks do."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_unit(frames: np.ndarray) -> Tensor:
    """uint8 frames (f, H, W, 3) → (f, 3, H, W) in −1…1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_frames(pixels: Tensor) -> np.ndarray:
    """(…, 3, H, W) in −1…1 → uint8 (…, H, W, 3)."""
    scaled = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return scaled.to(torch.uint8).movedim(-3, -1).cpu().numpy()
