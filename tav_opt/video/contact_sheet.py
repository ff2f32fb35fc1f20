"""Clips beside and below each other, with captions: a video to compare edits, a picture to print them."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tav_opt.config import InputError

PAPER, INK = (255, 255, 255), (34, 34, 34)
MARGIN = 12
PANEL = 256
"""Side by side, clips whose longer side is smaller are enlarged, so that captions can be read."""
THUMBNAIL = 192
"""Width of a frame on a contact sheet."""
MAX_LINES = 3
LINE_HEIGHT = 1.3

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def side_by_side(clips: list[np.ndarray], captions: list[str]) -> np.ndarray:
    """Clips uint8 (f, H, W, 3), all of one shape, in a row with a caption above each → (f, H', W', 3), sides even.

    Clips under 256 pixels are enlarged. Raises InputError where shapes differ or captions are not one per clip.
    """
    _check(clips, captions)
    if len({clip.shape for clip in clips}) != 1:
        raise InputError(f"clips of {[clip.shape for clip in clips]}: all must have one shape to be side by side")
    frames, height, width, _ = clips[0].shape
    scale = max(1, math.ceil(PANEL / max(height, width)))
    height, width = height * scale, width * scale
    font = ImageFont.load_default(max(15, width // 20))
    texts = [_wrapped(caption, width, font) for caption in captions]
    most = max(map(len, texts))
    texts = [[""] * (most - len(text)) + text for text in texts]  # short ones stand low, next to their clip
    top = MARGIN + _text_height(texts[0], font)
    size = (MARGIN + (width + MARGIN) * len(clips), top + height + MARGIN)
    page = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), PAPER)
    lefts = [MARGIN + (width + MARGIN) * index for index in range(len(clips))]
    for left, text in zip(lefts, texts, strict=True):
        _write(page, text, left, MARGIN, font)
    pages = np.repeat(np.asarray(page)[None], frames, axis=0)
    for left, clip in zip(lefts, clips, strict=True):
        for index in range(frames):
            pages[index, top : top + height, left : left + width] = _resized(clip[index], width, height)
    return pages


def contact_sheet(rows: list[np.ndarray], captions: list[str], columns: int = 8) -> np.ndarray:
    """Each clip uint8 (f, H, W, 3) as a row of frames spread evenly over it, its caption above → (H', W', 3).

    Frames are 192 pixels wide. Raises InputError where captions are not one per clip.
    """
    _check(rows, captions)
    if columns < 1:
        raise InputError(f"columns {columns}: must be 1 or more")
    columns = min(columns, max(len(clip) for clip in rows))
    font = ImageFont.load_default(20)
    sheet_width = MARGIN + (THUMBNAIL + MARGIN) * columns
    strips = [_strip(clip, caption, columns, sheet_width, font) for clip, caption in zip(rows, captions, strict=True)]
    return np.concatenate([*strips, np.full((MARGIN, sheet_width, 3), PAPER, np.uint8)])


def _strip(clip: np.ndarray, caption: str, columns: int, sheet_width: int, font: Font) -> np.ndarray:
    height = max(1, round(THUMBNAIL * clip.shape[1] / clip.shape[2]))
    text = _wrapped(caption, sheet_width - 2 * MARGIN, font)
    top = MARGIN + _text_height(text, font)
    page = Image.new("RGB", (sheet_width, top + height), PAPER)
    _write(page, text, MARGIN, MARGIN, font)
    chosen = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
    for column, index in enumerate(chosen):
        thumbnail = Image.fromarray(_resized(clip[index], THUMBNAIL, height))
        page.paste(thumbnail, (MARGIN + (THUMBNAIL + MARGIN) * column, top))
    return np.asarray(page)


def _check(clips: list[np.ndarray], captions: list[str]) -> None:
    if not clips or len(clips) != len(captions):
        raise InputError(f"{len(clips)} clips, {len(captions)} captions: give one or more clips, a caption for each")
    for clip in clips:
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
            raise InputError(f"clip {clip.dtype} {clip.shape}: must be uint8 (f, H, W, 3)")


def _resized(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))


def _wrapped(caption: str, width: int, font: Font) -> list[str]:
    """The caption in at most MAX_LINES lines no wider than `width` pixels; an ellipsis says that more was there."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1] + "…"]
    return [_shortened(line, width, font) for line in lines]


def _shortened(line: str, width: int, font: Font) -> str:
    while line.rstrip("…") and font.getlength(line) > width:
        line = line.rstrip("…")[:-1] + "…"
    return line


def _line(font: Font) -> int:
    return round(font.size * LINE_HEIGHT) if isinstance(font, ImageFont.FreeTypeFont) else 15


def _text_height(lines: list[str], font: Font) -> int:
    """Of the lines and the gap below them."""
    return len(lines) * _line(font) + MARGIN // 2


def _write(page: Image.Image, lines: list[str], left: int, top: int, font: Font) -> None:
    for index, line in enumerate(lines):
        ImageDraw.Draw(page).text((left, top + index * _line(font)), line, INK, font)
