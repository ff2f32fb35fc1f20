"""The rows of an evaluation: every edit by every method, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tav_opt.config import InputError
from tav_opt.files import read_object

FILES = ("file", "source")
"""Fields of a row that are paths."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One edit by one method."""

    method: str
    video: str
    edit: str
    category: str
    caption: str
    prompt: str
    values: dict[str, float]
    left_out: dict[str, str]
    networks: dict[str, str]
    file: Path
    """The edited video."""
    source: Path
    """The source's, of the same frames."""


def reported(run: Path) -> list[Row]:
    """The rows of an evaluation's report, from the folder of its results; raises InputError where it has none."""
    report = run / "report" / "report.json"
    found = read_object(report).get("edits")
    try:
        own = [Row(**edit | {name: run / edit[name] for name in FILES}) for edit in found or ()]
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{report} is no report of `tav-opt evaluate`") from None
    if gone := next((row.file for row in own if not row.file.is_file()), None):
        raise InputError(f"{gone} is gone: evaluate the suite again")
    return own
