"""Clips in and out of files: frames chosen by index, fitted, read from video or images; written as MP4, GIF or PNGs."""

from __future__ import annotations

import io
import math
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image

from tav_opt.config import InputError
from tav_opt.files import whole
from tav_opt.sources import FOLDER_FPS, LOCAL, Limits, Shown, images, moving

Fit = Literal["crop", "squash"]

ITU709 = 1  # the number in the H.264 standard for matrix, primaries and transfer alike
LIMITED_RANGE = 1
GIF_MAX_FPS = 50.0  # browsers slow down anything faster


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames uint8 (f, H, W, 3) RGB and the frames a second that show them at the source's speed."""

    frames: np.ndarray
    fps: float


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Which frames are kept, and at which size."""

    start: int
    stride: int
    count: int | None
    uniform: bool
    height: int | None
    width: int | None
    fit: Fit

    def __post_init__(self) -> None:
        if self.start < 0:
            raise InputError(f"start {self.start}: the first frame is 0")
        if self.stride < 1:
            raise InputError(f"stride {self.stride}: must be 1 or more")
        if self.count is not None and self.count < 1:
            raise InputError(f"frames {self.count}: must be 1 or more")
        if self.uniform and self.count is None:
            raise InputError("uniform: say how many frames")
        if (self.height is None) != (self.width is None):
            raise InputError(f"height {self.height}, width {self.width}: give both or neither")
        if self.height is not None and self.width is not None and min(self.height, self.width) < 1:
            raise InputError(f"size {self.height}×{self.width}: must be 1×1 or more")
        if self.fit not in ("crop", "squash"):
            raise InputError(f"fit {self.fit!r}: must be crop or squash")


def read(
    path: str | Path,
    *,
    start: int = 0,
    stride: int = 1,
    count: int | None = None,
    uniform: bool = False,
    height: int | None = None,
    width: int | None = None,
    fit: Fit = "crop",
) -> Clip:
    """Reads chosen frames of a video file (MP4, MOV, WebM, MKV, GIF, animated WebP) or of a folder of images.

    Frames are counted as shown, whatever their times: `count` of them (None: all) from `start` by `stride`, or, if
    `uniform`, spread evenly from `start` to the last (`stride` is then unused). They are cut to the aspect of
    (`height`, `width`) about their centre, or squashed, and resized. Rotation and mirroring are applied; alpha is laid
    on white. A folder's images are taken in the order of the numbers in their names, at 8 frames a second. Raises
    InputError when the file is missing, is none of these, is cut short, or has fewer frames.
    """
    path = Path(path)
    choice = _Choice(start=start, stride=stride, count=count, uniform=uniform, height=height, width=width, fit=fit)
    if path.is_dir():
        return _choose(lambda: images(path, LOCAL), choice, str(path), LOCAL)
    try:
        with path.open("rb") as file:
            return _choose(lambda: moving(file, str(path), LOCAL), choice, str(path), LOCAL)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except PermissionError:
        raise InputError(f"{path} may not be read") from None


def decode(
    data: bytes,
    limits: Limits = Limits(),  # noqa: B008 — frozen
    *,
    start: int = 0,
    stride: int = 1,
    count: int | None = None,
    uniform: bool = False,
    height: int | None = None,
    width: int | None = None,
    fit: Fit = "crop",
) -> Clip:
    """Reads chosen frames of a video file someone sent, as `read` does, within `limits`; raises InputError beyond."""
    if len(data) > limits.bytes:
        raise InputError(f"clip: {len(data)} bytes; at most {limits.bytes} are accepted")
    choice = _Choice(start=start, stride=stride, count=count, uniform=uniform, height=height, width=width, fit=fit)
    return _choose(lambda: moving(io.BytesIO(data), "clip", limits), choice, "clip", limits)


def _choose(source: Callable[[], Iterator[Shown]], choice: _Choice, name: str, limits: Limits) -> Clip:
    """Keeps the chosen frames of a source, fitted; `source()` starts it anew."""
    if (choice.height or 0) * (choice.width or 0) * 3 * (choice.count or 1) > limits.memory:
        raise InputError(f"{name}: {choice.count or 1} frames of {choice.height}×{choice.width} exceed the memory")
    wanted, last = _wanted(source, choice, name)
    pictures: list[np.ndarray] = []
    shown: list[Shown] = []
    seen = 0
    for index, frame in enumerate(source()):
        seen = index + 1
        if index not in wanted:
            continue
        pictures.append(_fitted(frame.picture(), choice))
        shown.append(frame)
        if pictures[-1].shape != pictures[0].shape:
            sizes = [f"{picture.shape[1]}×{picture.shape[0]}" for picture in (pictures[0], pictures[-1])]
            raise InputError(f"{name}: frame {index} is {sizes[1]}, the first is {sizes[0]}; give height and width")
        if len(pictures) * pictures[0].nbytes > limits.memory:
            raise InputError(f"{name}: over {limits.memory >> 20} MiB of frames; give fewer frames or a smaller size")
        if index == last:
            break
    needed = choice.start + 1 if last is None else last + 1
    if seen < needed:
        raise _too_few(name, seen, choice, needed)
    return Clip(frames=np.stack(pictures), fps=_average_fps(shown))


def _wanted(source: Callable[[], Iterator[Shown]], choice: _Choice, name: str) -> tuple[Container[int], int | None]:
    """The indices to keep, and the last of them (None: whatever the last is)."""
    if choice.count is None:
        return range(choice.start, sys.maxsize, choice.stride), None
    if not choice.uniform:
        indices = range(choice.start, choice.start + choice.stride * choice.count, choice.stride)
        return indices, indices[-1]
    total = sum(1 for _ in source())  # containers lie about it, or do not say
    if total < choice.start + choice.count:
        raise _too_few(name, total, choice, choice.start + choice.count)
    spread = np.linspace(choice.start, total - 1, choice.count).round().astype(int).tolist()
    return frozenset(spread), spread[-1]


def _too_few(name: str, total: int, choice: _Choice, needed: int) -> InputError:
    asked = f"start {choice.start}" if choice.uniform else f"start {choice.start}, stride {choice.stride}"
    return InputError(f"{name}: {choice.count or 1} frames from {asked} need {needed}; it has {total}")


def _average_fps(shown: list[Shown]) -> float:
    span = shown[-1].time - shown[0].time
    if span > 0:
        return round((len(shown) - 1) / span, 6)  # times are floats
    return 1 / shown[0].duration if shown[0].duration > 0 else FOLDER_FPS


def _fitted(image: Image.Image, choice: _Choice) -> np.ndarray:  # → (H, W, 3)
    if choice.height is None or choice.width is None or image.size == (choice.width, choice.height):
        return np.asarray(image)
    width, height = map(float, image.size)
    if choice.fit == "crop":
        scale = min(width / choice.width, height / choice.height)
        width, height = choice.width * scale, choice.height * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize((choice.width, choice.height), Image.Resampling.LANCZOS, box=box))


def write(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Writes frames uint8 (f, H, W, 3) RGB as H.264 (`.mp4`), `.gif`, or a new folder of PNGs (no suffix).

    A file appears under its name only when whole. MP4s play in browsers; odd sizes gain a repeated row or column. GIFs
    are shown at 50 frames a second at most. Raises InputError for another suffix, a folder that exists, other frames.
    """
    path = Path(path)
    writer = {".mp4": _write_mp4, ".gif": _write_gif, "": _write_pngs}.get(path.suffix.lower())
    if writer is None:
        raise InputError(f"{path}: {path.suffix} is not written; use .mp4, .gif, or a name without suffix for PNGs")
    if path.is_dir() or (writer is _write_pngs and path.exists()):
        raise InputError(f"{path} exists; choose a new name")
    _check_frames(frames, fps)
    with whole(path) as beside:
        writer(beside, frames, fps)


def write_encoded(path: Path, file: bytes) -> None:
    """Writes a video file that was encoded elsewhere; raises InputError where a folder has its name."""
    if path.is_dir():
        raise InputError(f"{path} exists; choose a new name")
    with whole(path) as beside:
        beside.write_bytes(file)


def encode_mp4(frames: np.ndarray, fps: float) -> bytes:
    """The bytes of the MP4 that `write` writes."""
    _check_frames(frames, fps)
    with tempfile.TemporaryDirectory() as folder:  # moving the index to the front needs a file
        path = Path(folder) / "clip.mp4"
        _write_mp4(path, frames, fps)
        return path.read_bytes()


def _check_frames(frames: np.ndarray, fps: float) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"frames {frames.dtype} {frames.shape}: must be uint8 (f, H, W, 3)")
    if not (math.isfinite(fps) and 0.001 <= fps <= 1000):
        raise InputError(f"fps {fps}: must lie between 0.001 and 1000")


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(10_000)


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    even = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]  # 4:2:0 halves both
    frames = np.pad(frames, even, mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=_rate(fps), options={"crf": "17"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = ITU709
        context.color_range = LIMITED_RANGE
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=ITU709, dst_color_range=LIMITED_RANGE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    rate = _rate(min(fps, GIF_MAX_FPS))
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frames.shape[2], height=frames.shape[1], format=av.VideoFormat("rgb24"), time_base=1 / rate
    )
    split, palette = graph.add("split"), graph.add("palettegen")
    use, sink = graph.add("paletteuse"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0)
    split.link_to(use, 1)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = index, 1 / rate
        source.push(frame)
    source.push(None)
    with av.open(str(path), "w", format="gif", options={"loop": "0"}) as container:
        stream = container.add_stream("gif", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "pal8"
        for _ in range(len(frames)):
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode())


def _write_pngs(path: Path, frames: np.ndarray, fps: float) -> None:
    path.mkdir()
    for index, pixels in enumerate(frames):
        Image.fromarray(pixels).save(path / f"{index:05d}.png")
