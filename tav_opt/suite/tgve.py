"""TGVE 2023 (Wu et al. 2023, arXiv 2310.16003): its CSV, its frames, and its layout of results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tav_opt.config import InputError
from tav_opt.files import replacing
from tav_opt.suite.suite_types import Category

CATEGORIES: dict[str, Category] = {
    "style": "style",
    "object": "subject",
    "background": "background",
    "multiple": "mixed",
}
"""Its four edits of each video, as its folders of results are called."""
SIDE = 480
"""Pixels of a side of its frames and results."""
_SOURCES = {"davis": "DAVIS", "youtube": "youtube", "videvo": "videvo"}
"""Its three parts, as their folders begin."""
_OWN = (
    "Video name",
    "Our GT caption",
    "Style Change Caption",
    "Object Change Caption",
    "Background Change Caption",
    "Multiple Changes Caption",
)
_TABLE = ("source", "video", "caption", *CATEGORIES)
"""Columns of the same as one plain table."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One of its videos."""

    source: str
    video: str
    caption: str
    prompts: Mapping[str, str]
    """By CATEGORIES."""


def entries(rows: list[list[str]], file: Path) -> Iterator[Entry]:
    """The videos of its own CSV, where rows head its three parts, or of a plain table with a column `source`.

    Raises InputError, naming the row, for columns that are missing and for a video before any part begins.
    """
    heading, *found = rows or [[]]
    if set(_TABLE) <= set(heading):
        for row in found:
            if any(row):
                yield _entry(dict(zip(heading, row, strict=False)), _TABLE, "", file)
        return
    if missing := [column for column in _OWN if column not in heading]:
        raise InputError(f"{file}: column {missing[0]!r} is missing: there are {', '.join(heading) or 'none'}")
    source = ""
    for number, row in enumerate(found, start=2):
        if not any(row):
            continue
        first = row[heading.index(_OWN[0])] if len(row) > heading.index(_OWN[0]) else ""
        if first.lower().endswith("videos:"):
            source = _known(first.split()[0].lower(), file)
            continue
        if not source:
            raise InputError(f"{file}: row {number}: {first!r} stands before a row such as 'DAVIS Videos:'")
        yield _entry(dict(zip(heading, row, strict=False)), ("", *_OWN), source, file)


def _entry(cells: dict[str, str], columns: tuple[str, ...], source: str, file: Path) -> Entry:
    source = source or _known(cells[columns[0]], file)
    video = cells[columns[1]]
    if empty := [column for column in columns[1:] if not cells.get(column)]:
        raise InputError(f"{file}: {video or 'a row'} has no {empty[0]}")
    prompts = {name: cells[column] for name, column in zip(CATEGORIES, columns[3:], strict=True)}
    return Entry(source=source, video=video, caption=cells[columns[2]], prompts=prompts)


def _known(source: str, file: Path) -> str:
    if source not in _SOURCES:
        raise InputError(f"{file}: source {source!r} is not {', '.join(_SOURCES)}")
    return source


def frames_folder(folder: Path, source: str, video: str) -> Path:
    """Where the frames of a video lie in the published data."""
    return folder / f"{_SOURCES[source]}_480p" / "480p_frames" / video


def write_result(folder: Path, source: str, video: str, edit: str, frames: np.ndarray) -> Path:
    """Writes frames uint8 (f, H, W, 3) where its evaluation script reads them: `SOURCE_480p/VIDEO/EDIT/00000.jpg` ….

    They are resized to 480×480, and take the place of a result that is there: it may be of other settings.
    """
    out = folder / f"{_SOURCES[source]}_480p" / video / edit
    with replacing(out) as beside:
        beside.mkdir()
        for number, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            picture.save(beside / f"{number:05d}.jpg", quality=95)
    return out
