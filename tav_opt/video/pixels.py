"""Frames as files and the wire have them, and as networks do."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_unit(frames: np.ndarray) -> Tensor:
    """uint8 frames (f, H, W, 3) → (f, 3, H, W) in −1…1."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_frames(pixels: Tensor) -> Tensor:
    """(…, 3, H, W) in −1…1 → uint8 (…, H, W, 3), on the same device."""
    scaled = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous()


def to_host(frames: Tensor) -> np.ndarray:
    """Frames from whatever device, in one transfer, which goes into pinned memory where they come from a GPU."""
    if frames.device.type != "cuda":
        return frames.cpu().numpy()
    host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
    return host.copy_(frames).numpy()  # waits: NumPy does not
