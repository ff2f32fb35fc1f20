"""The frames of a video file or a folder of images, one by one as shown; nothing is decoded that is not looked at."""

from __future__ import annotations

import io
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from tav_opt.config import InputError
from tav_opt.video import hdr

if TYPE_CHECKING:
    import av

FOLDER_FPS = 8.0
"""Images in a folder carry no times."""
READS = "MP4, MOV, WebM, MKV, GIF, animated WebP, a folder of images"
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# Playlists and concat scripts name other files and addresses to open; only self-contained containers are read.
CONTAINERS = "mov,matroska,webm,gif"
BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"uuid", b"meta", b"mfra"}
"""At the top level of MP4 and MOV."""
EBML_HEAD, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
"""At the top level of Matroska and WebM."""
ITU709, UNSPECIFIED = 1, 2
"""Colour matrices of ITU-T H.273."""
UNREAD_MATRICES = {
    8: "YCgCo",
    11: "SMPTE 2085",
    13: "chromaticity-derived",
    14: "ICtCp",
    15: "IPT",
    16: "YCgCo-R",
    17: "YCgCo-R",
}
"""FFmpeg's conversion would take them for BT.601 in silence."""
HD_HEIGHT = 720
"""From here on a video that names no matrix is of BT.709, below of BT.601."""
BWDIF_LEAST = 4
"""Rows and columns that FFmpeg's deinterlacer needs."""
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262
MAX_PIXEL_ASPECT = 4.0  # beyond, it is a mistake of the file or an attack on memory


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a clip may cost to decode; anything over is refused before it is paid for."""

    bytes: int = 64 << 20
    """Of the file."""
    pixels: int = 4096 * 2304
    """Of one frame."""
    frames: int = 2000
    """Passed over or kept."""
    duration: float = 120.0
    """Seconds up to the last frame looked at."""
    memory: int = 512 << 20
    """Bytes of all frames kept, after fitting; the peak is about twice that."""


LOCAL = Limits(bytes=sys.maxsize, pixels=1 << 28, frames=sys.maxsize, duration=math.inf, memory=8 << 30)
"""For one's own files: only what no machine would hold is refused."""


@dataclass(frozen=True)
class Shown:
    """A frame of a source: when it is shown, for how long (seconds), and its RGB picture, made only if asked for."""

    time: float | None
    """None where the file does not say: Matroska's times below zero, above all."""
    duration: float
    """0 where the file does not say."""
    picture: Callable[[], Image.Image]


def moving(file: IO[bytes], name: str, limits: Limits) -> Iterator[Shown]:
    """The frames of one file; its content, not its name, says what it is."""
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    if not head:
        raise InputError(f"{name} is empty")
    declared, size = _declared_bytes(file), file.seek(0, io.SEEK_END)
    if declared > size:
        raise InputError(f"{name} is cut short: {size} of {declared} bytes are there")
    file.seek(max(0, size - 512))
    if head[:3] == b"GIF" and not file.read().rstrip(b"\0\r\n ").endswith(b";"):
        raise InputError(f"{name} is cut short: it lacks the end of a GIF")
    file.seek(0)
    kind = _webp if head[:4] == b"RIFF" and head[8:] == b"WEBP" else _video
    first: float | None = None
    for index, frame in enumerate(kind(file, name, limits)):
        first = frame.time if first is None else first
        if index >= limits.frames:
            raise InputError(f"{name}: over {limits.frames} frames, the most that are accepted")
        if first is not None and frame.time is not None and frame.time - first > limits.duration:
            raise InputError(f"{name}: over {limits.duration:g} seconds, the most that are accepted")
        yield frame


def _check_pixels(name: str, width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise InputError(f"{name}: frames of {width}×{height}; at most {limits.pixels} pixels are accepted")


def images(
    folder: Path, limits: Limits, opened: Callable[[Path, Limits], Image.Image] | None = None
) -> Iterator[Shown]:
    """The pictures of a folder, each made by `opened` (`still` unless given)."""

    def numbers(path: Path) -> list[Any]:  # frame2 before frame10
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    def is_image(path: Path) -> bool:  # hidden: AppleDouble's ._files and their kin
        return path.suffix.lower() in IMAGES and not path.name.startswith(".") and not path.is_dir()

    paths = sorted(filter(is_image, folder.iterdir()), key=numbers)
    if not paths:
        raise InputError(f"{folder} holds no images ({' '.join(sorted(IMAGES))})")
    for index, path in enumerate(paths):
        yield Shown(index / FOLDER_FPS, 1 / FOLDER_FPS, partial(opened or still, path, limits))


def still(path: Path, limits: Limits) -> Image.Image:
    """One picture of a file, RGB; raises InputError where it is none."""
    try:
        with Image.open(path) as image:
            _check_pixels(str(path), *image.size, limits)
            return _on_white(ImageOps.exif_transpose(_eight_bits(image, str(path))))
    except (OSError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a whole image: {error}") from None


def _webp(file: IO[bytes], name: str, limits: Limits) -> Iterator[Shown]:
    try:
        with Image.open(file, formats=("WEBP",)) as image:
            _check_pixels(name, *image.size, limits)
            time = 0.0
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                image.load()
                duration = image.info.get("duration", 0) / 1000
                yield Shown(time, duration, partial(_on_white, image))
                time += duration
    except (OSError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} is cut short or corrupt: {error}") from None


def _video(file: IO[bytes], name: str, limits: Limits) -> Iterator[Shown]:
    import av

    options = {"format_whitelist": CONTAINERS, "max_pixels": str(2 * limits.pixels)}  # it counts padding too
    try:
        with av.open(file, options=options, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                raise InputError(f"{name} has no video in it")
            if stream.codec_context is None:
                raise InputError(f"{name}: its video codec is not one that can be decoded here")
            _check_pixels(name, stream.width, stream.height, limits)
            yield from _decoded(container, stream, name, limits)
    except av.error.FFmpegError as error:
        raise InputError(f"{name} is cut short, corrupt, or none of {READS} ({error.strerror})") from None


def _decoded(container: Any, stream: Any, name: str, limits: Limits) -> Iterator[Shown]:
    rate = stream.average_rate
    usual = 1 / float(rate) if rate and rate > 0 else 0.0  # times below zero make it negative
    aspect = float(stream.sample_aspect_ratio or 1)
    aspect = aspect if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else 1.0
    before = None
    for frame, after in pairwise(chain(_frames(container, stream, name, limits), [None])):
        duration = float(frame.duration * frame.time_base) if frame.duration else usual
        yield Shown(frame.time, duration, partial(_picture, before, frame, after, aspect, name))
        before = frame


def _frames(container: Any, stream: Any, name: str, limits: Limits) -> Iterator[av.VideoFrame]:
    import av

    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ("vp8", "vp9"):  # FFmpeg's own drop the alpha
        decoder = av.CodecContext.create(f"libvpx{'-vp9' if decoder.name == 'vp9' else ''}", "r")
        decoder.extradata = stream.codec_context.extradata
    decoder.options = {"max_pixels": str(2 * limits.pixels)}
    for index, frame in enumerate(frame for packet in container.demux(stream) for frame in decoder.decode(packet)):
        _check_pixels(name, frame.width, frame.height, limits)  # a stream may change its size on the way
        if frame.is_corrupt:
            raise InputError(f"{name} is cut short or corrupt at frame {index}")
        if frame.colorspace in UNREAD_MATRICES:
            matrix = UNREAD_MATRICES[frame.colorspace]
            raise InputError(f"{name}: its colour matrix {matrix} is not one that is read; convert it to BT.709")
        yield frame


def _declared_bytes(file: IO[bytes]) -> int:
    """Where MP4/MOV boxes or the Matroska segment say the file ends: decoders pass over a missing end in silence."""
    end = 0
    while len(head := file.read(16)) >= 12:
        if head[:4] in (EBML_HEAD, SEGMENT):
            length = 9 - head[4].bit_length()
            size = int.from_bytes(head[4 : 4 + length]) & ((1 << 7 * length) - 1)
            if size == (1 << 7 * length) - 1:  # unknown: written live
                return end
            end += 4 + length + size
        elif head[4:8] in BOXES:
            size = int.from_bytes(head[:4])
            end += int.from_bytes(head[8:]) if size == 1 else size
            if size == 0:  # up to the end of the file
                break
        else:
            break
        file.seek(end)
    return end


def _picture(
    before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None, aspect: float, name: str
) -> Image.Image:
    """A decoded frame as it is meant to be seen; `before` and `after` are its neighbours."""
    import av

    try:
        whole = _deinterlaced(before, frame, after) if frame.interlaced_frame else frame
        return _upright(_rgb(whole), frame, aspect)
    except av.error.FFmpegError as error:
        raise InputError(f"{name}: a frame of {frame.format.name} cannot be shown ({error.strerror})") from None


def _deinterlaced(before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None) -> av.VideoFrame:
    """The moment of a frame's first field, all rows of it; which rows moved its neighbours tell."""

    import av

    def shape(frame: av.VideoFrame) -> tuple[str, int, int]:
        return frame.format.name, frame.width, frame.height

    if min(frame.width, frame.height) < BWDIF_LEAST:
        return frame
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
    )
    sink = graph.add("buffersink")
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), sink).configure()
    frames = [near for near in (before, frame, after) if near is not None and shape(near) == shape(frame)]
    for near in frames:
        source.push(near)
    source.push(None)
    found = [sink.pull() for _ in range(1 + frames.index(frame))][-1]
    found.colorspace, found.color_range = frame.colorspace, frame.color_range
    return found


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """→ uint8 (H, W, 3), or (H, W, 4) where it has alpha; sRGB, whatever the video's matrix, range, bits and light."""
    from av.video.reformatter import Interpolation

    alpha = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    matrix = ITU709 if frame.colorspace == UNSPECIFIED and frame.height >= HD_HEIGHT else None
    transfer, primaries = frame.color_trc, frame.color_primaries
    if not hdr.is_foreign(transfer, primaries):
        deep = max(component.bits for component in frame.format.components) > 8
        # Of 10 bits, without which white becomes 253; 16 bits FFmpeg makes right only without.
        how = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT if deep else None
        return frame.to_ndarray(format="rgba" if alpha else "rgb24", src_colorspace=matrix, interpolation=how)
    signal = frame.to_ndarray(format="rgba64le" if alpha else "rgb48le", src_colorspace=matrix)
    pixels = hdr.to_srgb(signal[..., :3], transfer, primaries)
    return np.dstack([pixels, (signal[..., 3] >> 8).astype(np.uint8)]) if alpha else pixels


def _upright(pixels: np.ndarray, frame: av.VideoFrame, aspect: float) -> Image.Image:
    """A frame's pixels turned as it says, square, on white."""
    image = Image.fromarray(pixels)
    if aspect != 1:
        image = image.resize((max(round(image.width * aspect), 1), image.height), Image.Resampling.LANCZOS)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        # [a b u; c d v; x y w]: (x', y') = (a·x + c·y, b·x + d·y)
        a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
        turned = abs(b) > abs(a)
        image = image.transpose(Image.Transpose.TRANSPOSE) if turned else image
        image = ImageOps.mirror(image) if (c if turned else a) < 0 else image
        image = ImageOps.flip(image) if (b if turned else d) < 0 else image
    return _on_white(image)


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """An image of more bits scaled to 8, where Pillow only clips; raises InputError where its white is not known."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TIFF_BITS, (16,))[0]
    values = np.asarray(image)
    if tags.get(TIFF_PHOTOMETRIC, 1) != 1:
        raise InputError(f"{name}: greys whose zero is white are read with 8 bits only; save it with 8 bits")
    if image.mode == "I":
        raise InputError(f"{name}: {bits}-bit integers do not say what is white; save it with 8 bits, or 16 unsigned")
    if image.mode == "F" and not (values.min() >= 0 and values.max() <= 1):  # false for NaN too
        raise InputError(f"{name}: floats from {values.min():g} to {values.max():g}; only 0…1 is read, black to white")
    white = 1.0 if image.mode == "F" else 2.0**bits - 1
    scaled = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    scaled.info = {key: image.info[key] for key in ("exif",) if key in image.info}
    return scaled


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent shows white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
