"""HDR, wide gamut and deep colour; the truth is computed in float64 from the standards' other direction."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest

from tav_opt.config import InputError
from tav_opt.video import decode, hdr, read
from tav_opt.video.containers import Limits

PQ, HLG, BT709, SRGB = 16, 18, 1, 13
"""Transfers of ITU-T H.273."""
BARS = (
    (255, 255, 255),
    (128, 128, 128),
    (200, 60, 50),
    (60, 180, 70),
    (50, 70, 200),
    (20, 20, 20),
    (0, 0, 0),
    (90, 90, 90),
)
PRIMARIES = {
    1: ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
LUMA = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}
"""Of red and blue, by the matrix."""


def to_xyz(primaries: int) -> np.ndarray:
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in PRIMARIES[primaries]]).T
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    return columns * np.linalg.solve(columns, white)


def light(srgb: np.ndarray) -> np.ndarray:
    """0…1 of sRGB 0…255."""
    signal = srgb / 255
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def signal(nits: np.ndarray, transfer: int) -> np.ndarray:
    """What a camera or a grade writes for light of a display (SMPTE ST 2084; ARIB STD-B67 at 1000 nits)."""
    if transfer == PQ:
        power = (nits / 10_000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    if transfer == HLG:
        luma = nits / 1000 @ np.array([0.2627, 0.6780, 0.0593])
        scene = nits / 1000 * np.where(luma > 0, luma, 1)[:, None] ** (1 / 1.2 - 1)
        log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)
    relative = nits / 203
    return np.where(relative <= 0.0031308, relative * 12.92, 1.055 * relative ** (1 / 2.4) - 0.055)


def bars(nits: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Light (bars, 3) of BT.709 → the RGB signal 0…1 in other primaries."""
    return signal((nits @ (np.linalg.inv(to_xyz(primaries)) @ to_xyz(1)).T).clip(0), transfer)


def movie(
    rgb: np.ndarray, *, transfer: int = 2, primaries: int = 2, matrix: int = 9, bits: int = 10, full: bool = False,
    codec: str = "ffv1", tagged: int | None = None, height: int = 16,
) -> bytes:  # fmt: skip
    """Two frames of upright bars of an RGB signal (bars, 3) 0…1, without loss; `tagged`: as another matrix."""
    red, blue = LUMA[matrix]
    luma = rgb @ np.array([red, 1 - red - blue, blue])
    chroma = [(rgb[:, 2] - luma) / (2 - 2 * blue), (rgb[:, 0] - luma) / (2 - 2 * red)]
    unit = 1 << (bits - 8)
    if full:
        planes = [luma * (256 * unit - 1), *(128 * unit + part * (256 * unit - 1) for part in chroma)]
    else:
        planes = [unit * (16 + 219 * luma), *(unit * (128 + 224 * part) for part in chroma)]
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height = 8 * len(rgb), height
        stream.pix_fmt = "yuv444p" if bits == 8 else f"yuv444p{bits}le"
        context = stream.codec_context
        context.color_trc, context.color_primaries = transfer, primaries
        context.colorspace, context.color_range = matrix if tagged is None else tagged, 2 if full else 1
        frame = av.VideoFrame(stream.width, height, stream.pix_fmt)
        for plane, values in zip(frame.planes, planes, strict=True):
            row = np.rint(values).repeat(8).astype("u1" if bits == 8 else "<u2").view(np.uint8)
            np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, : len(row)] = row
        for pts in range(2):
            frame.pts = pts
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def shown(data: bytes) -> np.ndarray:
    """The colour in the middle of each bar."""
    return decode(data, count=1).frames[0, 8, 4::8].astype(int)


@pytest.mark.parametrize("transfer", [PQ, HLG], ids=["PQ", "HLG"])
@pytest.mark.parametrize("primaries", [9, 12, 1], ids=["BT.2020", "P3", "BT.709"])
def test_hdr_shows_what_the_display_would(transfer, primaries):
    expected = np.array(BARS)
    found = shown(movie(bars(203 * light(expected), transfer, primaries), transfer=transfer, primaries=primaries))
    assert found[0].min() >= 245, "a white page is white"
    assert np.abs(found[1:] - expected[1:]).max() <= 3, found


def test_the_levels_that_the_standard_names():
    """BT.2408, table 1: HDR reference white is 58 % of PQ and 75 % of HLG; BT.2100's nominal peak is 75 % of PQ."""
    assert hdr.pq_light(np.array([0.5807, 0.7518, 1.0])) * 203 == pytest.approx([203, 1000, 10_000], rel=1e-3)
    assert hdr.hlg_scene(np.array([0.0, 0.5, 0.75, 1.0])) == pytest.approx([0, 1 / 12, 0.265, 1], abs=1e-3)
    assert 1000 * hdr.hlg_scene(np.array([0.75])) ** 1.2 == pytest.approx([203], rel=1e-3)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_highlights_keep_their_order_and_greys_stay_grey(transfer):
    nits = np.geomspace(0.05, 1000, 24)[:, None].repeat(3, 1)
    found = shown(movie(bars(nits, transfer, 9), transfer=transfer, primaries=9))
    assert (np.ptp(found, axis=1) <= 1).all() and (np.diff(found[:, 0]) >= 0).all()
    assert found[-1, 0] >= 253 and found[nits[:, 0] < 150].max() < 240
    assert len(set(found[nits[:, 0] > 203][:, 0])) > 2, "light above white differs still"


def test_primaries_that_no_one_named_are_those_of_hdr():
    rgb = bars(203 * light(np.array(BARS)), PQ, 9)
    assert np.array_equal(
        shown(movie(rgb, transfer=PQ, primaries=2)), shown(movie(rgb, transfer=PQ, primaries=9))
    )  # fmt: skip


@pytest.mark.parametrize("primaries", [9, 12], ids=["BT.2020", "P3"])
def test_wide_gamut_without_hdr(primaries):
    expected = np.array(BARS)
    found = shown(movie(bars(203 * light(expected), SRGB, primaries), transfer=BT709, primaries=primaries))
    assert np.abs(found - expected).max() <= 3


@pytest.mark.parametrize("matrix", [1, 5, 9])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("bits", [8, 10, 16])
def test_matrix_range_and_bits_are_minded(matrix, full, bits):
    found = shown(movie(np.array(BARS) / 255, matrix=matrix, full=full, bits=bits))
    assert np.abs(found - BARS).max() <= 2


@pytest.mark.parametrize(("height", "matrix"), [(576, 5), (720, 1)])
def test_a_matrix_that_no_one_named_is_that_of_the_size(height, matrix):
    found = shown(movie(np.array(BARS) / 255, matrix=matrix, tagged=2, height=height, bits=8))
    assert np.abs(found - BARS).max() <= 2


def test_ten_bits_of_halved_chroma_reach_white():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p10le"
        frame = av.VideoFrame(32, 16, "yuv420p10le")
        for plane, value in zip(frame.planes, (940, 512, 512), strict=True):
            np.frombuffer(plane, "<u2")[:] = value
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert decode(file.getvalue()).frames.min() == 255


def test_a_matrix_that_would_be_read_wrong_is_refused():
    with pytest.raises(InputError, match="clip: its colour matrix ICtCp is not one that is read") as caught:
        shown(movie(np.array(BARS) / 255, tagged=14))
    assert "\n" not in str(caught.value)


def test_the_limits_hold():
    data = movie(bars(203 * light(np.array(BARS)), PQ, 9), transfer=PQ, primaries=9)
    with pytest.raises(InputError, match="at most 1000 pixels"):
        decode(data, Limits(pixels=1000))


def test_the_file_that_went_wrong(shared: Path):
    frames = read(shared / "inputs" / "hdr10pq.mp4").frames.astype(int)
    assert len(frames) == 8
    assert (frames.min(-1).max((1, 2)) >= 245).all(), "the white box"
    grey = frames[0, 40:, 60:]
    assert grey.min() >= 118 and grey.max() <= 138
