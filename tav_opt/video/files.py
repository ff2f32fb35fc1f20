"""Clips in and out of files: frames chosen by index, fitted, read from video or images; written as MP4, GIF or PNGs."""

from __future__ import annotations

import io
import json
import math
import sys
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, TypedDict, Unpack

import numpy as np
from PIL import Image, PngImagePlugin

from tav_opt.config import ClipConfig, Fit, InputError, PathLike
from tav_opt.files import check_place, whole
from tav_opt.video import sound as sounds
from tav_opt.video.containers import FOLDER_FPS, LOCAL, Limits, Shown, images, moving
from tav_opt.video.restoring import Shape

ITU709 = 1  # the number in the H.264 standard for matrix, primaries and transfer alike
LIMITED_RANGE = 1
STEADY = "mbtree=0"  # x264's macroblock trees, by AVX-512, are now and then others for the same frames
GIF_BLOCK = 255
"""Bytes of a comment's sub-block at most."""
GIF_MAX_FPS = 50.0  # browsers slow down anything faster


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Frames uint8 (f, H, W, 3) RGB and the frames a second that show them at the source's speed."""

    frames: np.ndarray
    fps: float
    begin: float | None = None
    """When its first frame is shown in a video file, in seconds; None where nobody knows, and of what is no file."""
    sound: bytes | None = None
    """That of its frames' time, as a Matroska file; None where the source has none."""
    shape: Shape | None = None
    """What its frames were fitted of; None where that is not known."""


class Choice(TypedDict, total=False):
    """Which frames are kept, and at which size; see `read`."""

    start: int
    stride: int
    count: int | None
    uniform: bool
    height: int | None
    width: int | None
    fit: Fit


@dataclass(frozen=True, kw_only=True)
class _Choice:
    start: int = 0
    stride: int = 1
    count: int | None = None
    uniform: bool = False
    height: int | None = None
    width: int | None = None
    fit: Fit = "crop"

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


def read(path: PathLike | ClipConfig, **choice: Unpack[Choice]) -> Clip:
    """Reads chosen frames of a video file (MP4, MOV, WebM, MKV, GIF, animated WebP) or of a folder of images.

    A ClipConfig says which; beside a path, keywords do. Frames are counted as shown, whatever their times: `count` of
    them (default: all) from `start` (0) by `stride` (1), or, if `uniform`, spread evenly from `start` to the last
    (`stride` is then unused). They are cut to the aspect of (`height`, `width`; default: as they are) about their
    centre, or squashed (`fit="squash"`), and resized. Rotation and mirroring are applied; alpha is laid on white. A
    folder's images are taken in the order of the numbers in their names, at 8 frames a second. The sound is that
    of the time of the frames. Raises InputError when the file is missing, is none of these, is cut short, or has fewer
    frames.
    """
    place, chosen = _asked(path, choice)
    if place.is_dir():
        return _choose(lambda: images(place, LOCAL), chosen, str(place), LOCAL)
    try:
        with place.open("rb") as file:
            clip = _choose(lambda: moving(file, str(place), LOCAL), chosen, str(place), LOCAL)
            return with_sound(clip, file, str(place))
    except FileNotFoundError:
        raise InputError(f"{place} does not exist") from None
    except PermissionError:
        raise InputError(f"{place} may not be read") from None


def fitted(source: Callable[[], Iterator[Shown]], clip: ClipConfig | Path) -> np.ndarray:
    """The frames of another source as `read` chooses and fits them of a clip, or of a path: uint8 (f, H, W, 3)."""
    place, chosen = _asked(clip, {})
    return _choose(source, chosen, str(place), LOCAL).frames


def with_sound(clip: Clip, file: IO[bytes], name: str) -> Clip:
    """With the sound of its time; pictures that move, GIF and WebP, have none."""
    file.seek(0)
    if clip.begin is None or file.read(4) in (b"RIFF", b"GIF8"):
        return clip
    return replace(clip, sound=sounds.cut(file, name, clip.begin, clip.begin + len(clip.frames) / clip.fps))


def decode(data: bytes, limits: Limits = Limits(), **choice: Unpack[Choice]) -> Clip:  # noqa: B008 — frozen
    """Reads chosen frames of a video file someone sent, as `read` does, within `limits`; raises InputError beyond."""
    if len(data) > limits.bytes:
        raise InputError(f"clip: {len(data)} bytes; at most {limits.bytes} are accepted")
    return _choose(lambda: moving(io.BytesIO(data), "clip", limits), _Choice(**choice), "clip", limits)


def _asked(path: PathLike | ClipConfig, choice: Choice) -> tuple[Path, _Choice]:
    if not isinstance(path, ClipConfig):
        return Path(path), _Choice(**choice)
    if choice:
        raise InputError(f"{', '.join(choice)}: a ClipConfig says itself which frames are read")
    own = asdict(path)
    return own.pop("video"), _Choice(count=own.pop("frames"), **own)


def _choose(source: Callable[[], Iterator[Shown]], choice: _Choice, name: str, limits: Limits) -> Clip:
    """Keeps the chosen frames of a source, fitted; `source()` starts it anew."""
    if (choice.height or 0) * (choice.width or 0) * 3 * (choice.count or 1) > limits.memory:
        raise InputError(f"{name}: {choice.count or 1} frames of {choice.height}×{choice.width} exceed the memory")
    wanted, last = _wanted(source, choice, name)
    pictures: list[np.ndarray] = []
    shape: Shape | None = None
    times: dict[int, float | None] = {}
    duration = 0.0
    seen = 0
    for index, frame in enumerate(source()):
        seen = index + 1
        if index not in wanted:
            continue
        picture = frame.picture()
        own = Shape(height=picture.height, width=picture.width, fit=choice.fit)
        shape = shape or own
        pictures.append(_fitted(picture, choice, own))
        times[index] = frame.time
        duration = duration or frame.duration
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
    return Clip(frames=np.stack(pictures), fps=_average_fps(times, duration), begin=times[min(times)], shape=shape)


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
    fits = 0 if choice.uniform else (total - 1 - choice.start) // max((choice.count or 1) - 1, 1)
    would_do = f"; stride {fits} would do" if fits > 0 else ""
    return InputError(f"{name}: {choice.count or 1} frames from {asked} need {needed}; it has {total}{would_do}")


def _average_fps(times: dict[int, float | None], duration: float) -> float:
    """Of frames by their index in the source, the first of which lasts `duration` seconds (0: nobody knows).

    Those without a time are taken to follow as the others do.
    """
    known = {index: time for index, time in times.items() if time is not None}
    if known and (span := known[max(known)] - known[min(known)]) > 0:
        span *= (max(times) - min(times)) / (max(known) - min(known))
        return round((len(times) - 1) / span, 6)  # times are floats
    return 1 / duration if duration > 0 else FOLDER_FPS


def _fitted(image: Image.Image, choice: _Choice, shape: Shape) -> np.ndarray:  # → (H, W, 3)
    if choice.height is None or choice.width is None or image.size == (choice.width, choice.height):
        return np.asarray(image)
    box = shape.taken(choice.height, choice.width)
    return np.asarray(image.resize((choice.width, choice.height), Image.Resampling.LANCZOS, box=box))


def write(
    path: PathLike,
    frames: np.ndarray,
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    *,
    sound: bytes | None = None,
) -> None:
    """Writes frames uint8 (f, H, W, 3) RGB as H.264 (`.mp4`), `.gif`, or a new folder of PNGs (no suffix).

    `metadata` becomes the comment of the file, or of each PNG, as JSON. A file appears under its name only when whole.
    MP4s play in browsers, with a `sound` as Clip has it; odd sizes gain a repeated row or column. GIFs are shown at 50
    frames a second at most. Raises InputError for another suffix, a folder that exists, other frames.
    """
    path = Path(path)
    check_out(path)
    _check_frames(frames, fps)
    writer = _WRITERS[path.suffix.lower()]
    with whole(path) as beside:
        writer(beside, frames, fps, _comment(metadata), sound)


def check_out(path: PathLike) -> None:
    """Raises InputError unless `write` can write there: a suffix, a name that is taken, a place without rights."""
    path = Path(path)
    check_place(path)
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        raise InputError(f"{path}: {path.suffix} is not written; use .mp4, .gif, or a name without suffix for PNGs")
    if path.is_dir() or (suffix == "" and path.exists()):
        raise InputError(f"{path} exists; choose a new name")


def write_encoded(path: PathLike, file: bytes) -> None:
    """Writes a video file that was encoded elsewhere; raises InputError where a folder has its name."""
    path = Path(path)
    check_out(path)
    with whole(path) as beside:
        beside.write_bytes(file)


def encode_mp4(
    frames: np.ndarray, fps: float, metadata: Mapping[str, Any] | None = None, *, sound: bytes | None = None
) -> bytes:
    """The bytes of the MP4 that `write` writes."""
    _check_frames(frames, fps)
    with tempfile.TemporaryDirectory() as folder:  # moving the index to the front needs a file
        path = Path(folder) / "clip.mp4"
        _write_mp4(path, frames, fps, _comment(metadata), sound)
        return path.read_bytes()


def encode_lossless(frames: np.ndarray) -> bytes:
    """Frames uint8 (f, H, W, 3) RGB as a Matroska file that keeps every value (FFV1)."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def write_png(path: PathLike, picture: np.ndarray, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a picture uint8 (H, W, 3) RGB as PNG, with `metadata` as its text `Comment`."""
    with whole(Path(path)) as beside:
        _save_png(beside, picture, _comment(metadata))


def _comment(metadata: Mapping[str, Any] | None) -> str:
    return json.dumps(metadata, ensure_ascii=False) if metadata else ""


def _check_frames(frames: np.ndarray, fps: float) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise InputError(f"frames {frames.dtype} {frames.shape}: must be uint8 (f, H, W, 3)")
    if not (math.isfinite(fps) and 0.001 <= fps <= 1000):
        raise InputError(f"fps {fps}: must lie between 0.001 and 1000")


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(10_000)


def _write_mp4(path: Path, frames: np.ndarray, fps: float, comment: str, sound: bytes | None) -> None:
    import av

    even = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]  # 4:2:0 halves both
    frames = np.pad(frames, even, mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=_rate(fps), options={"crf": "17", "x264-params": STEADY})
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
    if sound is not None:
        path.write_bytes(sounds.added(path.read_bytes(), sound))


def _write_gif(path: Path, frames: np.ndarray, fps: float, comment: str, _sound: bytes | None) -> None:
    import av

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
    if comment:
        _comment_gif(path, comment.encode())


def _comment_gif(path: Path, comment: bytes) -> None:
    """Puts a comment extension (GIF89a, section 24) before the first picture; FFmpeg writes none."""
    data = path.read_bytes()
    colours = 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0
    parts = [comment[at : at + GIF_BLOCK] for at in range(0, len(comment), GIF_BLOCK)]
    extension = b"\x21\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\0"
    path.write_bytes(data[: 13 + colours] + extension + data[13 + colours :])


def _write_pngs(path: Path, frames: np.ndarray, fps: float, comment: str, _sound: bytes | None) -> None:
    path.mkdir()
    for index, pixels in enumerate(frames):
        _save_png(path / f"{index:05d}.png", pixels, comment)


def _save_png(path: Path, pixels: np.ndarray, comment: str) -> None:
    text = PngImagePlugin.PngInfo()
    if comment:
        text.add_text("Comment", comment)
    Image.fromarray(pixels).save(path, "PNG", pnginfo=text)


_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif, "": _write_pngs}
