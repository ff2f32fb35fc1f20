"""Video files whose frames are known, and what becomes of a file that is changed at random."""

from __future__ import annotations

import io

import av
import numpy as np

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


SOURCES = {
    "mp4": video.encode_mp4(pictures(4, 64, 64), 8),
    "mkv": lossless(pictures(4, 64, 64)),
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
