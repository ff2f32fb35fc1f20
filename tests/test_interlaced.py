"""Interlaced video: rows of two moments become one; the truth is the first field's moment, drawn without a comb."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tav_opt.serving import decoding
from tav_opt.video import decode, read

HEIGHT, WIDTH, BOX = 64, 96, 24
STEP = 6
"""Pixels that the box moves from one field to the next."""


def moment(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A white box on grey, where it is after so many fields."""
    frame = np.full((height, width, 3), 60, np.uint8)
    frame[height // 4 : height // 2, STEP * number : STEP * number + BOX] = 255
    return frame


def woven(frames: int, *, top_first: bool) -> np.ndarray:
    """Two moments a frame, the first in the rows of the first field."""
    clip = np.stack([moment(2 * index) for index in range(frames)])
    for index in range(frames):
        clip[index, int(top_first) :: 2] = moment(2 * index + 1)[int(top_first) :: 2]
    return clip


def encoded(
    clip: np.ndarray,
    codec: str = "libx264",
    *,
    top_first: bool | None = True,
    pix_fmt: str = "yuv420p",
    matrix: int = 5,
) -> bytes:
    """A file in full range whose frames are flagged; `top_first` None: not flagged."""
    file = io.BytesIO()
    options = {"crf": "4", "qscale": "1"} | ({} if top_first is None else {"flags": "+ildct+ilme"})
    flag = av.filter.Graph()
    source = flag.add_buffer(width=clip.shape[2], height=clip.shape[1], format=pix_fmt, time_base=Fraction(1, 25))
    field = {True: "tff", False: "bff", None: "prog"}[top_first]
    flag.link_nodes(source, flag.add("setfield", field), flag.add("buffersink")).configure()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2
        for number, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix, dst_color_range=2)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            flag.push(frame)
            container.mux(stream.encode(flag.pull()))
        container.mux(stream.encode())
    return file.getvalue()


def combs(frame: np.ndarray) -> float:
    """How much a row differs from both its neighbours, which differ little: 0 without a comb."""
    grey = frame.astype(float).mean(-1)
    return float((np.abs(grey[1:-1] - (grey[:-2] + grey[2:]) / 2) - np.abs(grey[:-2] - grey[2:])).clip(0).max())


@pytest.mark.parametrize("top_first", [True, False], ids=["top", "bottom"])
def test_each_frame_is_the_moment_of_its_first_field(top_first):
    clip = woven(6, top_first=top_first)
    assert min(map(combs, clip)) > 150, "the source is woven"
    found = decode(encoded(clip, top_first=top_first))
    assert found.frames.shape == clip.shape and found.fps == pytest.approx(25, rel=1e-3)
    for number, frame in enumerate(found.frames):
        right, late = (np.abs(frame.astype(int) - moment(2 * number + field)).mean() for field in (0, 1))
        assert right < 4 and right < late / 3, f"frame {number}: {right:.1f}, {late:.1f} from the second field's"
        assert combs(frame) < 90, f"frame {number}"


def test_frames_chosen_are_those_of_all():
    data = encoded(woven(8, top_first=True))
    everything = decode(data).frames
    assert np.array_equal(decode(data, start=1, stride=3, count=3).frames, everything[1:8:3])
    assert np.array_equal(decode(data, start=7).frames, everything[7:])
    assert decode(data, count=3, uniform=True).frames.shape == (3, HEIGHT, WIDTH, 3)


def test_what_is_not_flagged_is_left_as_it_is():
    clip = woven(3, top_first=True)  # a picture of stripes, for all that anyone knows
    for codec, pix_fmt, error in (("ffv1", "yuv444p", 3), ("libx264", "yuv420p", 40)):
        found = decode(encoded(clip, codec, top_first=None, pix_fmt=pix_fmt)).frames
        assert np.abs(found.astype(int) - clip).max() <= error


def test_one_frame_alone():
    clip = woven(1, top_first=True)
    found = decode(encoded(clip))
    assert found.frames.shape == clip.shape and found.fps == pytest.approx(25)


@pytest.mark.parametrize(
    ("codec", "pix_fmt"), [("mpeg2video", "yuv420p"), ("prores_ks", "yuv422p10le"), ("ffv1", "yuv444p")]
)
@pytest.mark.parametrize("top_first", [True, False], ids=["top", "bottom"])
def test_other_codecs(codec, pix_fmt, top_first):
    clip = woven(5, top_first=top_first)
    found = decode(encoded(clip, codec, pix_fmt=pix_fmt, top_first=top_first)).frames
    assert len(found) == 5 and max(map(combs, found)) < 90


def test_colours_are_kept():
    clip = np.full((3, HEIGHT, WIDTH, 3), (200, 60, 50), np.uint8)
    for matrix in (1, 5):
        assert np.abs(decode(encoded(clip, matrix=matrix)).frames.astype(int) - clip).max() <= 4


@pytest.mark.parametrize("height, width", [(2, 32), (3, 32), (32, 2), (16, 16)])
def test_tiny_frames(height, width):
    clip = np.random.default_rng(0).integers(0, 255, (3, height, width, 3), dtype=np.uint8)
    data = encoded(clip, "ffv1", pix_fmt="yuv444p")
    assert decode(data).frames.shape == clip.shape


def test_the_largest_frames_fit_the_decoders_process():
    """HDR and interlaced at once, which costs most."""
    height, width = 2304, 4096
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("prores_ks", rate=25, options={"flags": "+ildct", "profile": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv422p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = 16, 9, 9
        frame = av.VideoFrame(width, height, "yuv422p10le")
        for plane in frame.planes:
            np.frombuffer(plane, "<u2")[:] = 512
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    wanted = decoding.Wanted(least=1, most=1, height=height, width=width)
    found = decoding.decode(file.getvalue(), wanted, seconds=30)
    assert found.shape == (1, height, width, 3) and np.ptp(found) <= 2


def test_the_file_that_went_wrong(shared: Path):
    found = read(shared / "inputs" / "interlaced.mp4")
    assert len(found.frames) == 8 and found.fps == pytest.approx(10)
    white = (found.frames.min(-1) > 200).sum((1, 2))
    assert np.ptp(white[1:]) <= 24, "the box is whole in every frame"
