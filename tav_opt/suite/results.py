"""The figures of an evaluation: every edit by every method, and tables of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tav_opt.config import InputError
from tav_opt.files import read_object
from tav_opt.suite.intervals import grouped
from tav_opt.suite.rows import Row
from tav_opt.suite.suite_types import Suite
from tav_opt.suite.unit_store import UnitStore
from tav_opt.suite.units import Unit
from tav_opt.suite.workshop import CLIP, EDIT, METRICS, SOURCE

PAPER = ("frame consistency", "textual alignment")
"""The columns of the paper's table 1."""
LOW_IS_GOOD = ("warping error", "structure distance", "background LPIPS")
DIGITS = {"textual alignment": 2, "PickScore": 2, "background PSNR": 2}
"""Behind the point, of metrics that are no parts of 1."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The mean of a metric over some edits, and its 95 % interval."""

    mean: float
    low: float | None
    """None, as `high` is, where there are edits of one video alone."""
    high: float | None
    edits: int


def rows(suite: Suite, planned: Iterable[Unit], store: UnitStore) -> list[Row]:
    """All edits that are measured, in the order of the suite."""
    measures = [unit for unit in planned if unit.kind == "measure"]
    done, found = store.all_done(measures), []
    for unit in measures:
        if unit.id not in done:
            continue
        assert unit.method is not None and unit.edit is not None
        source, edit = (store.fetched(need) for need in unit.needs)
        measured = read_object(store.fetched(unit) / METRICS)
        found.append(
            Row(
                method=unit.method.name,
                video=unit.video.name,
                edit=unit.edit.name,
                category=unit.edit.category,
                caption=str(read_object(source / SOURCE)["caption"]),
                prompt=unit.edit.prompt,
                values=measured["metrics"],
                left_out=measured["left_out"],
                networks=measured["networks"],
                file=edit / EDIT,
                source=source / CLIP,
            )
        )
    check_networks(found)
    return found


def check_networks(found: Iterable[Row]) -> None:
    """Raises InputError where figures of one table would be of two networks."""
    names: dict[str, str] = {}
    for row in found:
        for role, name in row.networks.items():
            if names.setdefault(role, name) != name:
                raise InputError(f"{row.method} {row.video} {row.edit}: {role} {name}, other edits {names[role]}")


def common(found: Sequence[Row]) -> list[Row]:
    """The edits that every method that is there has made: methods compare on the same edits alone."""
    methods = {row.method for row in found}
    made: dict[tuple[str, str], set[str]] = {}
    for row in found:
        made.setdefault((row.video, row.edit), set()).add(row.method)
    return [row for row in found if made[row.video, row.edit] == methods]


def metrics(found: Iterable[Row]) -> list[str]:
    """Names of the metrics that any edit has, in their usual order."""
    return list(dict.fromkeys(name for row in found for name in row.values))


def cells(found: Sequence[Row]) -> dict[str, dict[str, Cell]]:
    """By method and metric: the methods that have a metric compare on the same edits, though others leave it out."""
    shared = {name: _shared(found, name) for name in metrics(found)}
    table: dict[str, dict[str, Cell]] = {}
    for method in dict.fromkeys(row.method for row in found):
        own = [row for row in found if row.method == method]
        table[method] = {name: cell for name in metrics(found) if (cell := _cell(own, name, shared[name])) is not None}
    return table


def _shared(found: Sequence[Row], name: str) -> set[tuple[str, str]]:
    """The edits for which every method that has a metric at all has a value of it."""
    having = [row for row in found if name in row.values]
    return {(row.video, row.edit) for row in common(having)}


def _cell(found: Sequence[Row], name: str, edits: Collection[tuple[str, str]]) -> Cell | None:
    groups: dict[str, list[float]] = {}
    for row in found:
        if (row.video, row.edit) in edits and name in row.values:
            groups.setdefault(row.video, []).append(row.values[name])
    if not groups:
        return None
    mean, low, high = grouped(groups)
    if len(groups) < 2:
        low = high = None
    return Cell(mean=mean, low=low, high=high, edits=sum(map(len, groups.values())))


def best(table: dict[str, dict[str, Cell]], name: str) -> str | None:
    """The method whose mean is best, where there are several."""
    means = {method: row[name].mean for method, row in table.items() if name in row}
    if len(means) < 2:
        return None
    return (min if name in LOW_IS_GOOD else max)(means, key=lambda method: means[method])


def told(name: str, value: float) -> str:
    """A figure with the digits of its metric."""
    assert math.isfinite(value)
    return f"{value:.{DIGITS.get(name, 3)}f}"


def as_csv(found: Sequence[Row]) -> str:
    """One line an edit and method."""
    names = metrics(found)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "video", "edit", "category", "prompt", *names])
    for row in found:
        writer.writerow(
            [row.method, row.video, row.edit, row.category, row.prompt, *(row.values.get(name, "") for name in names)]
        )
    return file.getvalue()


def as_markdown(title: str, table: dict[str, dict[str, Cell]], names: Sequence[str]) -> str:
    """A table: method × metric, mean and interval, the best mean in bold."""
    lines = [f"### {title}", "", f"| method | edits | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    for method, row in table.items():
        edits = max((cell.edits for cell in row.values()), default=0)
        texts = [_marked(name, row[name], best(table, name) == method, edits) if name in row else "–" for name in names]
        lines.append(f"| {method} | {edits} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _marked(name: str, cell: Cell, bold: bool, edits: int) -> str:
    mean = told(name, cell.mean)
    text = f"**{mean}**" if bold else mean
    text += f", of {cell.edits}" if cell.edits < edits else ""
    if cell.low is None or cell.high is None:
        return text
    return f"{text} ({told(name, cell.low)} … {told(name, cell.high)})"


def as_json(table: dict[str, dict[str, Cell]]) -> dict[str, Any]:
    """Plain numbers."""
    return {method: {name: vars(cell) for name, cell in row.items()} for method, row in table.items()}
