"""Many clips tuned, for who only wants their checkpoints: an evaluation's units without edits, listed in a table."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from tav_opt import tuning
from tav_opt.config import (
    BaseConfig,
    ClipConfig,
    InputError,
    MetricsConfig,
    PathLike,
    TrainConfig,
    check_numbers,
    check_text,
)
from tav_opt.files import check_place, discard
from tav_opt.reference import as_declared
from tav_opt.suite import evaluating
from tav_opt.suite.evaluating import Shown, Where
from tav_opt.suite.manifests import named_rows
from tav_opt.suite.scheduling import Outcome
from tav_opt.suite.suite_file import check_names
from tav_opt.suite.suite_types import Method, Suite, SuiteVideo
from tav_opt.suite.unit_store import UnitStore
from tav_opt.suite.units import units

NEEDED = ("video", "prompt")
OWN = tuple(field.name for field in fields(ClipConfig) if field.name != "video")
"""Columns that there may be beside: a clip's own frames and size; an empty cell is what the command says."""
WORK = ".many"
"""Of the folder of checkpoints, where their units lie: `FOLDER/*` are the checkpoints."""


def read_clips(path: Path, base: BaseConfig, clip: ClipConfig, train: TrainConfig) -> Suite:
    """A CSV file of clips, one a row: video (seen from the file's folder), prompt, and perhaps a name and OWN.

    `clip` has what rows leave open; its video is not looked at. Raises InputError, naming row and column.
    """
    if train.keep_state:
        raise InputError("--keep-state does nothing with --many: other --steps are another folder")
    rows = named_rows(path, NEEDED)
    if not rows:
        raise InputError(f"{path} lists no clips")
    if unknown := [column for column in rows[0] if column not in (*NEEDED, "name", *OWN)]:
        raise InputError(f"{path}: column {unknown[0]!r} is unknown: there are {', '.join((*NEEDED, 'name', *OWN))}")
    try:
        videos = tuple(_video(row, path, clip) for row in rows)
        check_names("clips", [video.name for video in videos])
        for video in videos:
            check_numbers(video.clip)
            check_text(f"{video.name}: prompt", video.caption or "")
            tuning.check(train, video.caption or "")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    method = Method(name="tuned", tune=train)
    return Suite(file=path, model=base, videos=videos, methods=(method,), metrics=MetricsConfig(), measured_by={})


def _video(row: dict[str, str], path: Path, clip: ClipConfig) -> SuiteVideo:
    if not (row["video"] and row["prompt"]):
        raise InputError(f"clip {row['video']!r}, prompt {row['prompt']!r}: every row needs both")
    hints, file = get_type_hints(ClipConfig), path.absolute().parent / row["video"]
    own: dict[str, Any] = {}
    for name in OWN:
        if row.get(name):
            own[name] = as_declared(hints[name], f"{row['video']}: {name}", _value(row[name]))
    return SuiteVideo(name=row.get("name") or file.stem, clip=replace(clip, video=file, **own), caption=row["prompt"])


def _value(cell: str) -> Any:
    """As YAML reads it: 8 is a number, true is so."""
    try:
        return yaml.safe_load(cell)
    except yaml.YAMLError:
        return cell


def tune_all(suite: Suite, out: PathLike, where: Where, show: Shown) -> tuple[Outcome, list[Path]]:
    """Tunes the clips that are not tuned yet; each checkpoint is `out/NAME`, a link into `out/.many/`.

    A clip of other settings than before is tuned anew, and its link leads there then. Raises InputError where
    something is not there, before anything long begins, and when the disk is full.
    """
    out = Path(out)
    evaluating.check(suite)
    for video in suite.videos:
        check_place(out / video.name)
        if (place := out / video.name).exists() and not place.is_symlink():
            raise InputError(f"{place} is there and was made by something else: choose another --out")
    outcome = evaluating.do(suite, out / WORK, where, show, lambda place: units(suite, place))
    store = UnitStore(out / WORK)
    done = [unit for unit in outcome.units if unit.kind == "tune" and store.done(unit)]
    return outcome, [_linked(out / unit.video.name, store.folder(unit)) for unit in done]


def _linked(place: Path, folder: Path) -> Path:
    """A link to a folder, in the place of one that was there."""
    fresh = place.with_name(f".{place.name}.new")
    discard(fresh)
    fresh.symlink_to(os.path.relpath(folder, place.parent))
    os.replace(fresh, place)
    return place
