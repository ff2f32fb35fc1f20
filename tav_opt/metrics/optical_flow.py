"""Dense optical flow by OpenCV, and where it holds."""

from __future__ import annotations

import numpy as np

from tav_opt.metrics.left_out import LeftOut, library

LEAST = 12
"""Pixels of a side below which OpenCV's flow has no patch."""


def optical_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where each pixel of a frame uint8 (H, W, 3) is in another → float32 (H, W, 2), x and y in pixels.

    Dense inverse search (Kroeger et al. 2016, arXiv 1603.03590) at OpenCV's medium preset. Raises LeftOut where OpenCV
    is not installed, and for frames below 12 pixels.
    """
    cv2 = library("cv2", "OpenCV")
    if min(first.shape[:2]) < LEAST:
        raise LeftOut(f"needs frames of {LEAST}×{LEAST} or more, not {first.shape[1]}×{first.shape[0]}")
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (first, second)]
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)


def warp(picture: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """What a picture (H, W, channels) shows where a flow (H, W, 2) leads, between pixels linearly → the same shape."""
    cv2 = library("cv2", "OpenCV")
    at = _ends(flow)
    return cv2.remap(picture, at[..., 0], at[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def visible(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Pixels (H, W) that both frames show: the way there and back (both (H, W, 2)) ends where it began.

    |w + ŵ|² ≤ 0.01 (|w|² + |ŵ|²) + 0.5 (Ruder et al. 2016, arXiv 1604.08610), within the picture.
    """
    back = warp(backward, forward)
    length = (forward**2).sum(-1) + (back**2).sum(-1)
    height, width = forward.shape[:2]
    x, y = np.moveaxis(_ends(forward), -1, 0)
    within = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return within & (((forward + back) ** 2).sum(-1) <= 0.01 * length + 0.5)


def _ends(flow: np.ndarray) -> np.ndarray:
    """The places that a flow leads to, x and y."""
    y, x = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return np.stack([x, y], -1) + flow
