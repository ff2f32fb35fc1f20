"""Clips: the frame a moving square says it is, whatever the container, rotation, timing or damage."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tav_opt.config import ClipConfig, InputError
from tav_opt.video import decode, encode_mp4, read, write
from tav_opt.video.containers import Limits

CELL = 8
BACKGROUND = (30, 60, 120)
CLIPS = {
    "car-turn": (80, 10.0),
    "man-skiing": (91, 30 / 1.001),
    "man-surfing": (72, 24.0),
    "rabbit-watermelon": (186, 30),
}


def squares(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A white square whose cell, row by row, is the frame's index."""
    clip = np.full((frames, height, width, 3), BACKGROUND, np.uint8)
    for index in range(frames):
        row, column = divmod(index, width // CELL)
        clip[index, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = 255
    return clip


def indices(frames: np.ndarray) -> list[int]:
    """What the squares say."""
    rows, columns = frames.shape[1] // CELL, frames.shape[2] // CELL
    cells = frames[:, : rows * CELL, : columns * CELL].astype(float).mean(-1)
    cells = cells.reshape(len(frames), rows, CELL, columns, CELL).mean((2, 4))
    return cells.reshape(len(frames), -1).argmax(1).tolist()


def noise(frames: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (frames, 64, 96, 3), dtype=np.uint8)


def encoded(
    clip: np.ndarray,
    container: str,
    codec: str,
    pix_fmt: str,
    times: Sequence[float] | None = None,
    aspect: int = 1,
    rate: int = 24,
) -> bytes:
    """A file made by FFmpeg, not by the code under test; `times` in seconds."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options={"avoid_negative_ts": "disabled"}) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if clip.shape[-1] == 4 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def animated_webp(clip: np.ndarray, durations: list[int]) -> bytes:
    file = io.BytesIO()
    first, *others = [Image.fromarray(frame) for frame in clip]
    first.save(file, "WEBP", save_all=True, append_images=others, duration=durations, lossless=True)
    return file.getvalue()


def movie(kind: str, frames: int = 20) -> bytes:
    clip = squares(frames)
    if kind == "webp":
        return animated_webp(clip, [40] * frames)
    codecs = {
        "mp4": ("libx264", "yuv420p"),
        "mov": ("qtrle", "rgb24"),
        "webm": ("libvpx-vp9", "yuv420p"),
        "matroska": ("libx264", "yuv444p"),
        "gif": ("gif", "rgb8"),
    }
    return encoded(clip, kind, *codecs[kind])


KINDS = ["mp4", "mov", "webm", "matroska", "gif", "webp"]


@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_container(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "no-suffix-needed"
    path.write_bytes(movie(kind))
    clip = read(path)
    assert clip.frames.shape == (20, 64, 96, 3) and clip.frames.dtype == np.uint8
    assert indices(clip.frames) == list(range(20))
    assert clip.fps == pytest.approx(25 if kind in ("gif", "webp") else 24, rel=0.05)
    if kind != "gif":  # FFmpeg makes it with 256 fixed colours
        assert np.abs(clip.frames[:, -1, -1].astype(int) - BACKGROUND).max() < 6


@pytest.mark.parametrize("kind", ["mp4", "gif", "webp"])
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"count": 5}, [0, 1, 2, 3, 4]),
        ({"start": 3, "stride": 4, "count": 5}, [3, 7, 11, 15, 19]),
        ({"start": 2, "stride": 7}, [2, 9, 16]),
        ({"count": 4, "uniform": True, "stride": 9}, [0, 6, 13, 19]),
        ({"count": 20, "uniform": True}, list(range(20))),
        ({"start": 17, "count": 3, "uniform": True}, [17, 18, 19]),
        ({"count": 1, "uniform": True}, [0]),
    ],
)
def test_chooses_frames_by_index(kind: str, choice: dict, expected: list[int]) -> None:
    clip = decode(movie(kind), **choice)
    assert indices(clip.frames) == expected
    if len(expected) > 1:
        spread = (expected[-1] - expected[0]) / (len(expected) - 1)
        assert clip.fps == pytest.approx((24 if kind == "mp4" else 25) / spread, rel=0.07), (
            "plays at the source's speed"
        )


def test_variable_frame_rate_counts_frames_as_shown() -> None:
    times = [0.0, 0.04, 0.08, 1.0, 1.5, 1.54, 3.0]
    for container in ("mp4", "matroska"):
        clip = decode(encoded(squares(7), container, "libx264", "yuv420p", times))
        assert indices(clip.frames) == list(range(7))
        assert clip.fps == pytest.approx(6 / 3.0, abs=0.01)
    clip = decode(animated_webp(squares(4), [100, 300, 500, 900]))
    assert indices(clip.frames) == [0, 1, 2, 3]
    assert clip.fps == pytest.approx(3 / 0.9)


@pytest.mark.parametrize(
    ("container", "codec"), [("matroska", "libx264"), ("matroska", "ffv1"), ("webm", "libvpx-vp9")]
)
@pytest.mark.parametrize("start", [-0.3, -5, -0.04, 5, 3600])
def test_times_may_begin_anywhere(container: str, codec: str, start: float) -> None:
    times = [start + index / 10 for index in range(8)]
    clip = decode(encoded(squares(8), container, codec, "yuv420p", times, rate=10))
    assert indices(clip.frames) == list(range(8))
    assert clip.fps == pytest.approx(10, rel=0.01)


def test_times_of_chosen_frames_below_zero() -> None:
    data = encoded(squares(12), "matroska", "libx264", "yuv420p", [index / 10 - 0.3 for index in range(12)], rate=10)
    assert decode(data, stride=3).fps == pytest.approx(10 / 3)
    assert decode(data, start=1, stride=2, count=4).fps == pytest.approx(5)
    assert decode(data, count=4, uniform=True).fps == pytest.approx(3 / 1.1, rel=0.01)


def test_mp4_starts_late_and_hides_what_its_edit_list_hides() -> None:
    times = [index / 10 for index in range(8)]
    late = decode(encoded(squares(8), "mp4", "libx264", "yuv420p", [5 + time for time in times]))
    assert indices(late.frames) == list(range(8)) and late.fps == pytest.approx(10, rel=0.01)
    cut = decode(encoded(squares(8), "mp4", "libx264", "yuv420p", [time - 0.3 for time in times]))
    assert indices(cut.frames) == [3, 4, 5, 6, 7] and cut.fps == pytest.approx(10, rel=0.01)


def test_a_gap_counts_as_it_is_shown() -> None:
    clip = decode(encoded(squares(8), "matroska", "libx264", "yuv420p", [0, 0.1, 0.2, 0.3, 2.3, 2.4, 2.5, 2.6]))
    assert clip.fps == pytest.approx(7 / 2.6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_frame(kind: str) -> None:
    clip = decode(movie(kind, 1))
    assert clip.frames.shape == (1, 64, 96, 3) and 8 <= clip.fps <= 25


def test_folder_of_images_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for index, frame in enumerate(squares(12)):
        Image.fromarray(frame).save(tmp_path / f"frame{index}.{'png' if index % 2 else 'bmp'}")  # 2 before 10
    (tmp_path / "notes.txt").write_text("not an image")
    clip = read(tmp_path, start=1, stride=2, count=5)
    assert indices(clip.frames) == [1, 3, 5, 7, 9]
    assert clip.fps == 4
    assert np.array_equal(clip.frames, squares(12)[1:10:2])


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned 90° clockwise
    Image.fromarray(squares(1)[0]).save(tmp_path / "0.png", exif=exif)
    assert np.array_equal(read(tmp_path).frames[0], np.rot90(squares(1)[0], -1))


# The QuickTime file format: (x', y') = (a·x + c·y, b·x + d·y), stored as a, b, 0, c, d
@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((0, 1, -1, 0), lambda clip: np.rot90(clip, -1, (1, 2))),  # a phone held upright
        ((0, -1, 1, 0), lambda clip: np.rot90(clip, 1, (1, 2))),
        ((-1, 0, 0, -1), lambda clip: clip[:, ::-1, ::-1]),
        ((-1, 0, 0, 1), lambda clip: clip[:, :, ::-1]),  # a mirror
        ((0, 1, 1, 0), lambda clip: clip.transpose(0, 2, 1, 3)),
    ],
    ids=["clockwise", "counterclockwise", "half", "mirrored", "transposed"],
)
def test_rotation_metadata(matrix: tuple[int, ...], expected) -> None:
    source = squares(6)
    data = encoded(source, "mov", "qtrle", "rgb24")
    at = data.index(b"tkhd") + 4 + 40  # version, times, id, duration, layer, volume come first
    a, b, c, d = (value << 16 for value in matrix)
    assert struct.unpack(">9i", data[at : at + 36]) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    data = data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]
    assert np.array_equal(decode(data).frames, expected(source))


@pytest.mark.parametrize("kind", ["qtrle", "vp9", "gif", "webp", "png"])
def test_alpha_is_laid_on_white(kind: str, tmp_path: Path) -> None:
    pixels = np.zeros((64, 96, 4), np.uint8)
    pixels[:, 48:] = (200, 40, 40, 255)
    clip = np.repeat(pixels[None], 3, 0)
    if kind == "png":
        Image.fromarray(pixels).save(tmp_path / "0.png")
        frame = read(tmp_path).frames[0]
    elif kind in ("gif", "webp"):
        file = io.BytesIO()
        images = [Image.fromarray(frame) for frame in clip]
        images[1].putpixel((90, 3), (0, 0, 255, 255))  # else they are merged into one
        images[0].save(file, kind, save_all=True, append_images=images[1:2], duration=100, disposal=2, lossless=True)
        frame = decode(file.getvalue()).frames[-1]
    else:
        container, codec, pix_fmt = {"qtrle": ("mov", "qtrle", "argb"), "vp9": ("webm", "libvpx-vp9", "yuva420p")}[kind]
        frame = decode(encoded(clip, container, codec, pix_fmt)).frames[-1]
    assert frame[:, :44].min() > 245
    assert np.abs(frame[8:, 52:].astype(int) - (200, 40, 40)).max() < 10


def test_pixels_that_are_not_square() -> None:
    clip = decode(encoded(squares(3), "mp4", "libx264", "yuv420p", aspect=2))
    assert clip.frames.shape == (3, 64, 192, 3)


def test_fit() -> None:
    left, middle, right = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    wide = np.zeros((2, 64, 128, 3), np.uint8)
    wide[:, :, :32], wide[:, :, 32:96], wide[:, :, 96:] = left, middle, right
    file = encoded(wide, "mov", "qtrle", "rgb24")
    cropped = decode(file, height=32, width=32).frames
    assert cropped.shape == (2, 32, 32, 3) and (cropped[:, :, 3:-3] == middle).all()
    squashed = decode(file, height=32, width=32, fit="squash").frames
    assert (squashed[:, :, [2, 16, 29]] == [left, middle, right]).all()
    assert decode(file, height=48, width=41).frames.shape == (2, 48, 41, 3)
    tall = decode(file, height=64, width=32).frames  # no scaling: exactly the centre
    assert np.array_equal(tall, wide[:, :, 48:80])


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 16)], ids=str)
@pytest.mark.parametrize("fps", [24.0, 29.97, 7.4925])
def test_mp4_round_trip(size: tuple[int, int], fps: float, tmp_path: Path) -> None:
    source = squares(8, *size)
    write(tmp_path / "clip.mp4", source, fps)
    clip = read(tmp_path / "clip.mp4")
    assert clip.frames.shape[1:3] == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert indices(clip.frames) == list(range(8))
    assert clip.fps == pytest.approx(fps, rel=1e-5)
    assert np.abs(clip.frames[:, : size[0], : size[1]].astype(int) - source).mean() < 2


def test_mp4_plays_in_browsers() -> None:
    data = encode_mp4(squares(5), 12)
    assert data.index(b"moov") < data.index(b"mdat"), "the index comes first, so it plays while it loads"
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)  # BT.709, limited


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (90, 160, 30)])
def test_mp4_keeps_colours(color: tuple[int, int, int]) -> None:
    frames = decode(encode_mp4(np.full((2, 32, 32, 3), color, np.uint8), 8)).frames
    assert np.abs(frames.astype(int) - color).max() <= 4


def test_gif_round_trip_keeps_equal_frames_and_the_loop(tmp_path: Path) -> None:
    source = np.repeat(squares(4, 65, 97), 3, axis=0)
    write(tmp_path / "clip.gif", source, 24)
    clip = read(tmp_path / "clip.gif")
    assert np.array_equal(clip.frames, source)
    assert clip.fps == pytest.approx(24, rel=0.03)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.info["loop"] == 0


def test_png_folder_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "frames", noise(11), 8)
    assert np.array_equal(read(tmp_path / "frames").frames, noise(11))
    with pytest.raises(InputError, match="exists"):
        write(tmp_path / "frames", noise(1), 8)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_a_failed_write_leaves_nothing_and_loses_nothing(name: str, tmp_path: Path) -> None:
    old = tmp_path / name
    if old.suffix:
        old.write_bytes(b"old")
    code = (
        "import resource, signal, sys; import numpy as np; from tav_opt.video import write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "write(sys.argv[1], np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), dtype=np.uint8), 8)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(old)], capture_output=True, text=True)
    assert done.returncode != 0, "a disk that is full must be noticed"
    assert [path.name for path in tmp_path.iterdir()] == ([name] if old.suffix else [])
    assert not old.suffix or old.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "frames", "fps", "message"),
    [
        ("clip.avi", noise(1), 8, "clip.avi: .avi is not written"),
        ("clip.mp4", noise(1)[0], 8, "frames uint8 (64, 96, 3): must be uint8"),
        ("clip.mp4", noise(1).astype(float), 8, "frames float64"),
        ("clip.mp4", noise(1)[:0], 8, "frames uint8 (0, 64, 96, 3)"),
        ("clip.gif", noise(1), 0, "fps 0"),
        ("clip.gif", noise(1), float("nan"), "fps nan"),
    ],
)
def test_refuses_to_write(name: str, frames: np.ndarray, fps: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        write(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [0.99, 0.7, 0.3, 0.05])
def test_truncated_files_are_refused(kind: str, part: float) -> None:
    data = movie(kind)
    with pytest.raises(InputError, match=r"^clip (is cut short|has no video)"):
        decode(data[: int(len(data) * part)], count=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "clip is empty"),
        (b"hello, world\n" * 1000, "none of MP4, MOV"),
        (bytes(10_000), "none of MP4, MOV"),
        (np.random.default_rng(1).bytes(10_000), "none of MP4, MOV"),
    ],
    ids=["empty", "text", "zeros", "random"],
)
def test_what_is_no_video_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        decode(data)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(InputError, match=f"a.mp4.*{message.removeprefix('clip ')}") as error:
        read(tmp_path / "a.mp4")
    assert "\n" not in str(error.value)


def test_playlists_open_no_other_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(movie("mp4"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{secret}\n#EXT-X-ENDLIST\n"
    for text in (playlist, f"ffconcat version 1.0\nfile '{secret}'\n"):
        with pytest.raises(InputError, match="none of MP4"):
            decode(text.encode())


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"count": 21}, "clip: 21 frames from start 0, stride 1 need 21; it has 20"),
        ({"count": 5, "start": 2, "stride": 5}, "need 23; it has 20"),
        ({"count": 4, "start": 17, "uniform": True}, "clip: 4 frames from start 17 need 21; it has 20"),
        ({"start": 20}, "need 21; it has 20"),
        ({"count": 0}, "frames 0"),
        ({"start": -1}, "start -1"),
        ({"stride": 0}, "stride 0"),
        ({"uniform": True}, "say how many"),
        ({"height": 8}, "height 8, width None"),
        ({"height": 0, "width": 8}, "size 0×8"),
        ({"fit": "stretch"}, "fit 'stretch'"),
    ],
)
@pytest.mark.parametrize("kind", ["mp4", "webp"])
def test_bad_choices_are_named(kind: str, choice: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        decode(movie(kind), **choice)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_anywhere_is_decoded_or_refused(kind: str) -> None:
    source, random = movie(kind), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        data = bytearray(source)
        for at in random.integers(0, min(len(data), 700), random.integers(1, 12)):  # headers are there
            data[at] = random.integers(0, 256)
        try:
            decode(bytes(data), height=16, width=16)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused, "some damage is found"


def test_a_configuration_chooses_all_itself(tmp_path: Path) -> None:
    for index, frame in enumerate(squares(9)):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    config = ClipConfig(video=tmp_path, start=1, stride=3, frames=3, height=32, width=16, fit="squash")
    told = read(tmp_path, start=1, stride=3, count=3, height=32, width=16, fit="squash")
    assert np.array_equal(read(config).frames, told.frames) and told.frames.shape == (3, 32, 16, 3)
    spread = ClipConfig(video=tmp_path, frames=2, uniform=True, height=64, width=96)
    assert np.array_equal(read(spread).frames, read(tmp_path).frames[[0, 8]])
    with pytest.raises(InputError, match="stride: a ClipConfig says itself which frames are read"):
        read(config, stride=1)


def test_missing_and_empty_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.mp4 does not exist"):
        read(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="holds no images"):
        read(tmp_path)
    for index, frame in enumerate((squares(1)[0], squares(1, 32, 32)[0])):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    with pytest.raises(InputError, match="frame 1 is 32×32, the first is 96×64"):
        read(tmp_path)
    assert read(tmp_path, height=16, width=16).frames.shape == (2, 16, 16, 3)
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"1\.png is not a whole image"):
        read(tmp_path, height=16, width=16)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(bytes=100), "at most 100 are accepted"),
        (Limits(pixels=6000), "frames of 96×64; at most 6000 pixels"),
        (Limits(frames=19), "over 19 frames"),
        (Limits(duration=0.5), "over 0.5 seconds"),
        (Limits(memory=19 * 64 * 96 * 3), "MiB of frames"),
    ],
    ids=["bytes", "pixels", "frames", "duration", "memory"],
)
@pytest.mark.parametrize("kind", ["mp4", "gif", "webp"])
def test_limits(kind: str, limits: Limits, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(movie(kind), limits)
    assert len(decode(movie(kind), Limits(frames=20, pixels=64 * 96, memory=20 * 64 * 96 * 3)).frames) == 20


def test_a_size_asked_for_is_checked_before_it_is_made() -> None:
    with pytest.raises(InputError, match="exceed the memory"):
        decode(movie("mp4"), height=100_000, width=100_000)


def bombs() -> dict[str, bytes]:
    """Small files that would decode to gigabytes."""

    def png(side: int) -> bytes:
        file = io.BytesIO()
        Image.new("1", (side, side)).save(file, "PNG")
        return file.getvalue()

    gif, webp, growing = bytearray(movie("gif")), bytearray(movie("webp")), io.BytesIO()
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    webp[24:30] = (16382).to_bytes(3, "little") * 2
    with av.open(growing, "w", format="mov") as file:  # its size changes on the way
        stream = file.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "monob"
        for index, side in enumerate((64, 64, 16_000)):
            packet = av.Packet(png(side))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 10)
            file.mux(packet)
    return {"gif": bytes(gif), "webp": bytes(webp), "growing": growing.getvalue()}


@pytest.mark.parametrize("name", ["gif", "webp", "growing"])
def test_bombs_cost_no_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(bombs()[name])
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from tav_opt.config import InputError; from tav_opt.video import decode\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (400 << 20,) * 2)\n"
        "try: decode(Path(sys.argv[1]).read_bytes(), start=2, count=1)\n"
        "except InputError: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr


def test_imports_no_torch() -> None:
    code = "import sys, tav_opt.video, tav_opt.video.contact_sheet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", CLIPS)
def test_real_clips(name: str, shared: Path) -> None:
    total, fps = CLIPS[name]
    path = shared / "clips" / f"{name}.mp4"
    clip = read(path, count=8, stride=4, height=64, width=64)
    assert clip.frames.shape == (8, 64, 64, 3)
    assert clip.fps == pytest.approx(fps / 4, rel=1e-4)
    assert clip.frames.std() > 20 and np.abs(np.diff(clip.frames.astype(int), axis=0)).mean() > 1, "a moving picture"
    with pytest.raises(InputError, match=f"it has {total}"):
        read(path, start=total - 1, count=2)


def test_a_crop_whose_size_is_rounded_stays_inside_the_picture(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (718, 718)).save(tmp_path / "in" / "0.png")
    assert read(tmp_path / "in", count=1, stride=1, height=280, width=256).frames.shape == (1, 280, 256, 3)


def test_the_same_frames_are_the_same_file_whatever_runs_beside():
    """Eight at once: a few in two hundred were others while x264 had its macroblock trees."""
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    frames = np.repeat(np.repeat(frames[:, ::8, ::8], 8, axis=1), 8, axis=2)
    with ThreadPoolExecutor(8) as pool:
        files = set(pool.map(lambda _: encode_mp4(frames, 8), range(200)))
    assert len(files) == 1
