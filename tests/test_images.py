"""Folders of images as they are found: bits, floats, channels, hidden files; the truth is an 8-bit picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms

from tav_opt.config import InputError
from tav_opt.video import read

GREY = np.array([[255, 0, 128], [1, 254, 40]], np.uint8).repeat(8, 0).repeat(8, 1)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def save_16(path: Path, order: str = "<") -> None:
    mode = {"<": "I;16", ">": "I;16B"}[order]
    values = (GREY.astype(np.uint16) * 257).astype(f"{order}u2")
    Image.frombytes(mode, GREY.shape[::-1], values.tobytes()).save(path)


def tiff(path: Path, data: bytes, *, bits: int, photometric: int = 1, kind: int = 1, channels: int = 1) -> None:
    """A TIFF of GREY's size in one strip; Pillow writes few of those that it reads."""
    entries, start = 9, 8 + 2 + 12 * 9 + 4 + 8
    head = b"II*\0" + (8).to_bytes(4, "little") + entries.to_bytes(2, "little")
    for tag, form, count, value in (
        (256, 4, 1, GREY.shape[1]),
        (257, 4, 1, GREY.shape[0]),
        (258, 3, channels, bits if channels == 1 else start - 8),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, start),
        (277, 3, 1, channels),
        (279, 4, 1, len(data)),
        (339, 3, 1, kind),
    ):
        head += b"".join(part.to_bytes(size, "little") for part, size in ((tag, 2), (form, 2), (count, 4), (value, 4)))
    path.write_bytes(head + bytes(4) + bits.to_bytes(2, "little") * 4 + data)


def twelve_bits(values: np.ndarray) -> bytes:
    wide = np.rint(values.astype(float) * 4095 / 255).astype(np.uint16)
    return np.packbits(wide[..., None] >> np.arange(11, -1, -1) & 1).tobytes()  # the highest first


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("16.png", save_16),
        ("16.tif", save_16),
        ("16-big-endian.tif", lambda path: save_16(path, ">")),
        ("12.tif", lambda path: tiff(path, twelve_bits(GREY), bits=12)),
        ("float.tif", lambda path: Image.fromarray(GREY.astype(np.float32) / 255).save(path)),
        ("8.png", lambda path: Image.fromarray(GREY).save(path)),
        ("grey-alpha.png", lambda path: Image.fromarray(GREY).convert("LA").save(path)),
    ],
)
def test_greys_of_any_depth_are_scaled(name, save, tmp_path):
    save(tmp_path / name)
    assert np.array_equal(read(tmp_path).frames[0], GREY[..., None].repeat(3, -1))


YCBCR = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason="Pillow 12 cannot read the YCbCr TIFFs that it writes"
)


def lab(path: Path) -> None:
    srgb, target = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(Image.fromarray(RGB), srgb, target, outputMode="LAB")
    assert image is not None
    image.save(path)


@pytest.mark.parametrize(
    ("name", "save", "error"),
    [
        ("rgb.png", lambda path: Image.fromarray(RGB).save(path), 0),
        ("cmyk.tif", lambda path: Image.fromarray(RGB).convert("CMYK").save(path), 0),
        ("cmyk.jpg", lambda path: Image.fromarray(RGB).convert("CMYK").save(path, quality=100, subsampling=0), 6),
        pytest.param("ycbcr.tif", lambda path: Image.fromarray(RGB).convert("YCbCr").save(path), 3, marks=YCBCR),
        ("lab.tif", lab, 16),
        ("16.tif", lambda path: tiff(path, (RGB.astype("<u2") * 257).tobytes(), bits=16, photometric=2, channels=3), 0),
    ],
)
def test_colours_of_any_kind_are_read(name, save, error, tmp_path):
    save(tmp_path / name)
    assert np.abs(read(tmp_path).frames[0].astype(int) - RGB).max() <= error


@pytest.mark.parametrize("mode", ["1", "P"])
def test_few_colours_are_read(mode, tmp_path):
    few = np.where(RGB > 127, 255, 0).astype(np.uint8) if mode == "P" else np.where(GREY > 127, 255, 0).astype(np.uint8)
    Image.fromarray(few).convert(mode).save(tmp_path / "0.png")
    assert np.array_equal(read(tmp_path).frames[0], few if mode == "P" else few[..., None].repeat(3, -1))


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (lambda path: Image.fromarray(GREY.astype(np.int32)).save(path), "32-bit integers do not say what is white"),
        (lambda path: tiff(path, GREY.astype("<i2").tobytes(), bits=16, kind=2), "16-bit integers"),
        (lambda path: tiff(path, GREY.astype("<u2").tobytes(), bits=16, photometric=0), "zero is white"),
        (lambda path: Image.fromarray(GREY.astype(np.float32)).save(path), "floats from 0 to 255; only 0…1"),
        (lambda path: Image.fromarray(GREY / np.float32(255) - 0.1).save(path), "floats from -0.1 to 0.9"),
        (lambda path: Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(path), "floats from nan"),
    ],
    ids=["int32", "int16", "white is zero", "large floats", "negative floats", "NaN"],
)
def test_what_has_no_known_white_is_refused_in_one_line(save, words, tmp_path):
    save(tmp_path / "0.tif")
    with pytest.raises(InputError, match=r"0\.tif: .*") as caught:
        read(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_exif_turns_sixteen_bits_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned 90° clockwise
    values = GREY.astype(np.uint16) * 257
    Image.frombytes("I;16", GREY.shape[::-1], values.tobytes()).save(tmp_path / "0.png", exif=exif)
    assert np.array_equal(read(tmp_path).frames[0, ..., 0], np.rot90(GREY, -1))


def test_hidden_files_and_folders_are_no_frames(tmp_path):
    for number in range(3):
        Image.fromarray(RGB).save(tmp_path / f"frame{number}.png")
        (tmp_path / f"._frame{number}.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    (tmp_path / ".hidden.jpg").write_bytes(b"half of a ")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "more.png").mkdir()
    assert len(read(tmp_path).frames) == 3


def test_a_link_to_nothing_is_no_frame_left_out_in_silence(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "0.png")
    (tmp_path / "1.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"1\.png"):
        read(tmp_path)


def test_the_files_that_went_wrong(shared):
    frames = read(shared / "inputs" / "f16gray").frames
    found = frames[0, [5, 5, 60, 60], [5, 90, 5, 90], 0].tolist()
    assert found == [200, 40, 40, 128]
    assert len(read(shared / "inputs" / "fmac2").frames) == 6
