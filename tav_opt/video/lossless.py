"""Frames as a file that gives them back bit for bit: how maps travel."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np


def encode_mkv(frames: np.ndarray, fps: float = 8.0) -> bytes:
    """uint8 (f, H, W, 3) RGB → a Matroska file with FFV1 in it."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
