"""Video files whose frames are known, what a file says of itself, and what becomes of one that is changed at random."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from tav_opt import video


def lossless(frames: np.ndarray) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def pictures(count: int, height: int, width: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def interlaced_hdr(frames: np.ndarray) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"flags": "+ildct+ilme"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = 16, 9, 9
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


SOURCES = {
    "mp4": video.encode_mp4(pictures(4, 64, 64), 8),
    "mkv": lossless(pictures(4, 64, 64)),
    "hdr": interlaced_hdr(pictures(4, 64, 64)),
}


def mutated(data: bytes, changes: list[tuple[float, int, str]]) -> bytes:
    found = bytearray(data)
    for where, value, how in changes:
        at = int(where * len(found))
        match how:
            case "s" | "e" | "t" if at < len(found):
                found[at] = value
            case "i" | "n":
                found[at:at] = bytes([value]) * (1 + value)
            case "d" | "l":
                del found[at : at + 1 + value]
            case "c" | "u":
                del found[at:]
    return bytes(found)


def comments(path: Path) -> list[dict[str, Any]]:
    """Of the file, or of each picture in the folder."""
    if path.is_dir():
        return [comment for picture in sorted(path.iterdir()) for comment in comments(picture)]
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return [json.loads(container.metadata["comment"])]
    with Image.open(path) as image:
        image.load()
        return [json.loads(image.info["Comment" if path.suffix == ".png" else "comment"])]
