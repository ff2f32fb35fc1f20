"""Colours of full-range and limited video, of BT.601 and BT.709, read and written: against the standards' formulas."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from tav_opt import cli, video
from tav_opt.engines.pytorch import open_checkpoint

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 120, 40)]
COLOURS += [(30, 160, 220)]
PATCH = 16
MATRICES = {"BT.601": (0.299, 0.114, 6), "BT.709": (0.2126, 0.0722, 1)}
"""Weights of red and blue in luma, and the number in ITU-T H.273."""
LIMITED, FULL = 1, 2


def patches() -> np.ndarray:
    """(H, W, 3), four colours in a row, two rows."""
    return np.array(COLOURS, np.uint8).reshape(2, 4, 3).repeat(PATCH, 0).repeat(PATCH, 1)


def planes(rgb: np.ndarray, matrix: str, colour_range: int) -> list[np.ndarray]:
    """Y, Cb and Cr of RGB, as ITU-R BT.601 and 709 have them."""
    red, blue, _ = MATRICES[matrix]
    r, g, b = np.moveaxis(rgb / 255, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / 2 / (1 - blue), (r - y) / 2 / (1 - red)
    scaled = (255 * y, 128 + 255 * cb, 128 + 255 * cr)
    if colour_range == LIMITED:
        scaled = (16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr)
    return [np.rint(plane.clip(0, 255)).astype(np.uint8) for plane in scaled]


def encoded(given: list[np.ndarray], matrix: str, colour_range: int, form: str, count: int = 1) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *given[0].shape, form
        stream.codec_context.colorspace = MATRICES[matrix][2]
        stream.codec_context.color_range = colour_range
        frame = av.VideoFrame(given[0].shape[1], given[0].shape[0], form)
        frame.colorspace, frame.color_range = MATRICES[matrix][2], colour_range
        for plane, values in zip(frame.planes, given, strict=True):
            step = given[0].shape[0] // plane.height
            rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
            rows[:, : plane.width] = values[::step, ::step]
        for frame.pts in range(count):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("form", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("colour_range", [LIMITED, FULL], ids=["limited", "full"])
def test_colours_are_read_as_they_are_tagged(form, matrix, colour_range):
    rgb = patches()
    found = video.decode(encoded(planes(rgb, matrix, colour_range), matrix, colour_range, form)).frames[0]
    middles = (slice(PATCH // 2, None, PATCH),) * 2
    assert np.abs(found[middles].astype(int) - rgb[middles]).max() <= 2


def test_the_tags_matter_or_the_test_above_proves_nothing():
    rgb = patches()
    wrong = video.decode(encoded(planes(rgb, "BT.601", FULL), "BT.709", LIMITED, "yuv444p")).frames[0]
    assert np.abs(wrong.astype(int) - rgb).max() > 20


def test_what_is_written_is_limited_bt_709_and_says_so():
    rgb = patches()
    file = video.encode_mp4(rgb[None].repeat(2, 0), 8)
    with av.open(io.BytesIO(file)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, LIMITED)
        luma = np.frombuffer(frame.planes[0], np.uint8).reshape(-1, frame.planes[0].line_size)[:, : frame.width]
    expected = planes(rgb, "BT.709", LIMITED)[0]
    middles = (slice(PATCH // 2, None, PATCH),) * 2
    assert np.abs(luma[middles].astype(int) - expected[middles]).max() <= 3
    assert luma[middles].min() >= 14 and luma[middles].max() <= 237


def test_a_full_range_source_goes_through_unchanged():
    rgb = patches()
    read = video.decode(encoded(planes(rgb, "BT.601", FULL), "BT.601", FULL, "yuv420p")).frames
    again = video.decode(video.encode_mp4(read, 8)).frames
    middles = (slice(None), *(slice(PATCH // 2, None, PATCH),) * 2)
    assert np.abs(again[middles].astype(int) - rgb[None][middles]).max() <= 6


@pytest.mark.full
def test_the_commands_take_full_range_for_what_it_is_and_write_what_players_expect(golden, tmp_path):
    """The same pictures in either range are the same source, whose edit is limited BT.709."""
    base, clips = golden / "reference_checkpoint" / "sd", []
    for name, matrix, colour_range in (("full", "BT.601", FULL), ("limited", "BT.709", LIMITED)):
        file, out = tmp_path / f"{name}.mp4", tmp_path / name
        file.write_bytes(encoded(planes(patches(), matrix, colour_range), matrix, colour_range, "yuv444p", count=2))
        asked = f"tune --model {base} --video {file} --prompt x --frames 2 --stride 1 --height 64 --width 64 --steps 1"
        assert cli.main([*asked.split(), "--inversion-steps", "2", "--device", "cpu", "--out", str(out)]) == 0
        clips.append(open_checkpoint(out).source_latents)
    assert (clips[0] - clips[1]).abs().mean() < 0.02 * clips[1].std()
    asked = f"edit {tmp_path / 'full'} --prompt x --steps 2 --device cpu --out {tmp_path / 'edit.mp4'}"
    assert cli.main(asked.split()) == 0
    with av.open(tmp_path / "edit.mp4") as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, LIMITED)
