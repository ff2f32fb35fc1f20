"""Manifests of public benchmarks of video editing, read as they are published (docs/suite.md says where they are)."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tav_opt.config import ClipConfig, InputError
from tav_opt.files import read_json
from tav_opt.reference import as_declared, check_keys, read_yaml
from tav_opt.suite import tgve
from tav_opt.suite.suite_types import Category, SuiteEdit, SuiteVideo, numbered

Clips = Callable[[Path], ClipConfig]
"""Which frames are taken of a video at a path."""
Reader = Callable[[Path, Path, Path | None, Clips], list[SuiteVideo]]
_VIDEOS = (".mp4", ".mov", ".webm", ".mkv", ".gif", ".webp")
_FIVE: dict[str, Category] = {"1": "subject", "2": "subject", "3": "other", "4": "other", "5": "other", "6": "other"}
"""FiVE's kinds of edits: rigid and other replacement, colour, material, addition, removal."""
_EDITBOARD = ("original_video_path", "edited_video_path", "semantic_mask_path", "source_prompt", "target_prompt")


def read(kind: str, file: Path, folder: Path, masks: Path | None, clips: Clips) -> list[SuiteVideo]:
    """The videos and edits that a benchmark's manifest lists; `folder` is where its videos are, `masks` its masks.

    Whether the videos are there is not looked at. Raises InputError, naming the entry, for a manifest of another form.
    """
    try:
        videos = READERS[kind](file, folder, masks, clips)
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(str(file)) else f"{file}: {text}") from None
    if not videos:
        raise InputError(f"{file} lists no videos")
    return videos


def rows(file: Path) -> list[list[str]]:
    """The rows of a CSV file, blanks around cells cut off; raises InputError where it cannot be read."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            return [[cell.strip() for cell in row] for row in csv.reader(opened)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def named_rows(file: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file with a heading by its columns, which must be these; blank rows do not count."""
    heading, *found = rows(file) or [[]]
    if missing := [column for column in columns if column not in heading]:
        raise InputError(f"{file}: column {missing[0]} is missing: there are {', '.join(heading) or 'none'}")
    for number, row in enumerate(found, start=2):
        if any(row) and len(row) != len(heading):
            raise InputError(f"{file}: row {number} has {len(row)} cells, not {len(heading)}")
    return [dict(zip(heading, row, strict=True)) for row in found if any(row)]


def _tgve(file: Path, folder: Path, masks: Path | None, clips: Clips) -> list[SuiteVideo]:
    """`SOURCE_480p/480p_frames/VIDEO/` (Wu et al. 2023, arXiv 2310.16003)."""
    _no_masks(masks)
    return [
        SuiteVideo(
            name=entry.video,
            clip=clips(tgve.frames_folder(folder, entry.source, entry.video)),
            caption=entry.caption,
            edits=tuple(
                SuiteEdit(name=name, prompt=prompt, category=tgve.CATEGORIES[name])
                for name, prompt in entry.prompts.items()
            ),
            source=entry.source,
        )
        for entry in tgve.entries(rows(file), file)
    ]


def _v2vbench(file: Path, folder: Path, masks: Path | None, clips: Clips) -> list[SuiteVideo]:
    """YAML data[{video_id, edit[{prompt}]}] (Sun et al. 2024); edits are called by their number, as its results are."""
    _no_masks(masks)
    return [_v2v_video(entry, f"data[{number}]", folder, clips) for number, entry in enumerate(_data(file), start=1)]


def _data(file: Path) -> list[Any]:
    found = read_yaml(file)
    check_keys(found, {"data", *found}, ("data",))
    return as_declared(list, "data", found["data"])


def _v2v_video(entry: Any, where: str, folder: Path, clips: Clips) -> SuiteVideo:
    entry = as_declared(dict, where, entry)
    check_keys(entry, set(entry) | {"video_id", "edit"}, ("video_id", "edit"), f"{where}.")
    name = as_declared(str, f"{where}.video_id", entry["video_id"])
    edits = []
    for number, edit in enumerate(as_declared(list, f"{where}.edit", entry["edit"])):
        edit = as_declared(dict, f"{where}.edit[{number}]", edit)
        check_keys(edit, set(edit) | {"prompt"}, ("prompt",), f"{where}.edit[{number}].")
        edits.append(SuiteEdit(name=str(number), prompt=as_declared(str, "prompt", edit["prompt"]), category="mixed"))
    caption = next((str(entry[key]) for key in ("prompt", "source_prompt", "caption") if entry.get(key)), None)
    return SuiteVideo(name=name, clip=clips(_found(folder, name)), caption=caption, edits=tuple(edits))


def _editboard(file: Path, folder: Path, masks: Path | None, clips: Clips) -> list[SuiteVideo]:
    """CSV of five columns (Chen et al. 2025, arXiv 2409.09668); edits are called as its edited videos are."""
    _no_masks(masks)
    found: dict[str, SuiteVideo] = {}
    for row in named_rows(file, _EDITBOARD):
        original, edited, mask, caption, prompt = (row[column] for column in _EDITBOARD)
        name = Path(original).stem
        before = found.get(name)
        own = {"source prompts": caption, "paths": folder / original, "masks": folder / mask if mask else None}
        if before is not None:
            known = {"source prompts": before.caption, "paths": before.clip.video, "masks": before.mask}
            if differs := next((what for what in own if own[what] != known[what]), None):
                raise InputError(f"{name} has two {differs}: {str(known[differs])!r} and {str(own[differs])!r}")
        edits = () if before is None else before.edits
        found[name] = SuiteVideo(
            name=name,
            clip=clips(folder / original),
            caption=caption,
            edits=(*edits, SuiteEdit(name=Path(edited).stem, prompt=prompt, category="mixed")),
            mask=folder / mask if mask else None,
        )
    return list(found.values())


def _five(file: Path, folder: Path, masks: Path | None, clips: Clips) -> list[SuiteVideo]:
    """`editN_FiVE.json`, one of them or their folder (Li et al. 2025, arXiv 2503.13684); masks are its `bmasks/`."""
    files = sorted(file.glob("edit*_FiVE.json")) if file.is_dir() else [file]
    if not files:
        raise InputError(f"{file} holds no edit*_FiVE.json")
    found: dict[str, SuiteVideo] = {}
    for each in files:
        number = re.match(r"edit(\d)", each.name)
        if number is None or number[1] not in _FIVE:
            raise InputError(f"{each}: its name is not edit1_FiVE.json … edit6_FiVE.json")
        for index, entry in enumerate(as_declared(list, each.name, read_json(each)), start=1):
            where = f"{each.name}[{index}]"
            entry = as_declared(dict, where, entry)
            texts = ("video_name", "source_prompt", "target_prompt")
            check_keys(entry, set(entry) | set(texts), texts, f"{where}.")
            name, caption, prompt = (as_declared(str, f"{where}.{key}", entry[key]) for key in texts)
            _add_five(found, name, caption, SuiteEdit(name="", prompt=prompt, category=_FIVE[number[1]]), number[1])
    return [
        SuiteVideo(
            name=video.name,
            clip=clips(_found(folder, video.name)),
            caption=video.caption,
            edits=video.edits,
            mask=None if masks is None else masks / video.name,
        )
        for video in found.values()
    ]


def _add_five(found: dict[str, SuiteVideo], name: str, caption: str, edit: SuiteEdit, number: str) -> None:
    """Of a video that several files name, whose source prompts may be worded anew for each edit, the first counts."""
    before = found.get(name)
    edits = () if before is None else before.edits
    same = sum(other.name.startswith(f"edit{number}") for other in edits)
    named = SuiteEdit(
        name=f"edit{number}" + (f"-{same + 1}" if same else ""), prompt=edit.prompt, category=edit.category
    )
    clip = ClipConfig(video=Path(name))
    found[name] = SuiteVideo(
        name=name, clip=clip, caption=caption if before is None else before.caption, edits=(*edits, named)
    )


def _davis(file: Path, folder: Path, masks: Path | None, clips: Clips) -> list[SuiteVideo]:
    """DAVIS's `JPEGImages/480p/VIDEO/` and a list of prompts: CSV video, caption, prompt, category.

    Masks are its `Annotations/480p/`. The paper's own list of 42 videos and 140 prompts was never published.
    """
    found: dict[str, tuple[str | None, list[SuiteEdit]]] = {}
    for row in named_rows(file, ("video", "caption", "prompt", "category")):
        caption, edits = found.setdefault(row["video"], (row["caption"] or None, []))
        if row["caption"] and row["caption"] != caption:
            raise InputError(f"{row['video']} has two captions: {caption!r} and {row['caption']!r}")
        category = as_declared(Category, f"{row['video']}: category", row["category"])
        edits.append(SuiteEdit(name="", prompt=row["prompt"], category=category))
    return [
        SuiteVideo(
            name=name,
            clip=clips(folder / name),
            caption=caption,
            edits=numbered(edits),
            mask=None if masks is None else masks / name,
        )
        for name, (caption, edits) in found.items()
    ]


def _found(folder: Path, name: str) -> Path:
    """A video of that name: a file of whatever format, or a folder of frames."""
    files = [folder / f"{name}{suffix}" for suffix in _VIDEOS]
    return next((file for file in files if file.is_file()), folder / name if (folder / name).is_dir() else files[0])


def _no_masks(masks: Path | None) -> None:
    if masks is not None:
        raise InputError(f"manifest.masks {masks} does nothing: this manifest has no place for masks, or its own")


READERS: dict[str, Reader] = {
    "tgve": _tgve,
    "v2vbench": _v2vbench,
    "editboard": _editboard,
    "five": _five,
    "davis": _davis,
}
"""By the kinds of manifests."""
