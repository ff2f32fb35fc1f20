"""`report/`: tables, players, plots and contact sheets of an evaluation, to be opened without a network."""

from __future__ import annotations

import html
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tav_opt import video
from tav_opt.files import replacing, write_json
from tav_opt.suite import results
from tav_opt.suite.media import Media, fit_in_a_page
from tav_opt.suite.results import Cell
from tav_opt.suite.rows import FILES, Row
from tav_opt.suite.suite_types import Suite
from tav_opt.video import contact_sheet

PAGE = Path(__file__).with_name("report.html")
MOST_SHEETS = 400


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What all files of a report are made of."""

    suite: Suite
    found: Sequence[Row]
    compared: Sequence[Row]
    """On the edits that all methods made."""
    table: dict[str, dict[str, Cell]]
    faults: dict[str, str]
    kept_back: Sequence[str]


def write(suite: Suite, found: Sequence[Row], faults: dict[str, str], kept_back: Sequence[str], out: Path) -> Path:
    """Writes `out`, in the place of a report that is there, and returns its page.

    Methods are compared on the edits that all of them made; every edit that is measured is in the grid and the CSV.
    """
    compared = results.common(found)
    content = _Content(
        suite=suite,
        found=found,
        compared=compared,
        table=results.cells(compared),
        faults=faults,
        kept_back=kept_back,
    )
    with replacing(out) as folder:
        folder.mkdir()
        (folder / "report.csv").write_text(results.as_csv(found), encoding="utf-8")
        (folder / "report.md").write_text(_markdown(content), encoding="utf-8")
        write_json(folder / "report.json", _json(content, out.parent))
        page = _page(content, folder)
        (folder / "index.html").write_text(page, encoding="utf-8")
    return out / "index.html"


def _by_category(compared: Sequence[Row]) -> dict[str, dict[str, dict[str, Cell]]]:
    categories = dict.fromkeys(row.category for row in compared)
    return {name: results.cells([row for row in compared if row.category == name]) for name in categories}


def _networks(found: Sequence[Row]) -> dict[str, str]:
    return {role: name for row in found for role, name in row.networks.items()}


def _facts(suite: Suite, found: Sequence[Row], compared: Sequence[Row]) -> list[str]:
    """What has to be known before figures are read."""
    edits = len({(row.video, row.edit) for row in compared})
    all_there = len({row.method for row in found}) == len(suite.methods)
    said = [
        f"{len(suite.videos)} videos, {suite.edits} edits, {len(suite.methods)} methods; compared on the {edits} edits "
        f"that every method made{'' if all_there else ' that made any'}.",
        *(f"{role}: {name}" for role, name in _networks(found).items()),
        "Means over edits; intervals are 95 % bootstrap intervals, whole videos drawn anew.",
    ]
    if len(found) < suite.edits * len(suite.methods):
        counts = Counter(row.method for row in found)
        told = ", ".join(f"{method.name} {counts[method.name]}" for method in suite.methods)
        said.insert(1, f"Not all is done. Of the {suite.edits} edits are measured: {told}.")
    left = {name: reason for row in found for name, reason in row.left_out.items()}
    return said + [f"{name}: left out of some edits or all, {reason}" for name, reason in left.items()]


def _markdown(content: _Content) -> str:
    paper = [name for name in results.PAPER if name in results.metrics(content.compared)]
    others = [name for name in results.metrics(content.compared) if name not in paper]
    parts = [
        f"# {content.suite.file.stem}",
        "\n".join(f"- {fact}" for fact in _facts(content.suite, content.found, content.compared)),
    ]
    parts.append(results.as_markdown("Table 1 of the paper", content.table, paper))
    if others:
        parts.append(results.as_markdown("Later benchmarks' metrics", content.table, others))
    for name, own in _by_category(content.compared).items():
        title = f"{name.capitalize()} edits" if name in ("mixed", "other") else f"Edits of the {name}"
        parts.append(results.as_markdown(title, own, paper))
    if content.faults:
        parts.append("### Not done\n\n" + "\n".join(f"- {name}: {fault}" for name, fault in content.faults.items()))
    return "\n\n".join(parts) + "\n"


def _json(content: _Content, home: Path) -> dict[str, Any]:
    """Files are named as seen from the folder of the results, which may be moved with them."""
    seen = lambda row: {name: os.path.relpath(vars(row)[name], home) for name in FILES}  # noqa: E731
    return {
        "suite": str(content.suite.file),
        "model": content.suite.model,
        "networks": _networks(content.found),
        "table": results.as_json(content.table),
        "by category": {name: results.as_json(own) for name, own in _by_category(content.compared).items()},
        "edits": [vars(row) | seen(row) for row in content.found],
        "faults": content.faults,
        "not done for them": list(content.kept_back),
    }


def _page(content: _Content, folder: Path) -> str:
    from tav_opt.suite import report_plots

    categories = _by_category(content.compared)
    data = {
        "name": content.suite.file.stem,
        "facts": _facts(content.suite, content.found, content.compared),
        "metrics": results.metrics(content.found),
        "paper": list(results.PAPER),
        "low": list(results.LOW_IS_GOOD),
        "digits": {name: results.DIGITS.get(name, 3) for name in results.metrics(content.found)},
        "methods": [method.name for method in content.suite.methods],
        "table": results.as_json(content.table),
        "categories": {name: results.as_json(own) for name, own in categories.items()},
        "edits": _cards(content.found, folder),
        "faults": content.faults,
        "keptBack": list(content.kept_back),
    }
    told = json.dumps(data, ensure_ascii=False, allow_nan=False)
    told = told.replace("<", "\\u003c")  # neither a script's end nor a comment that would hide it
    plots = (
        "".join(f"<figure>{svg}</figure>" for svg in report_plots.plots(content.compared, content.table))
        if content.compared
        else ""
    )
    page = PAGE.read_text(encoding="utf-8")
    return (
        page.replace("{{title}}", html.escape(content.suite.file.stem))
        .replace("{{plots}}", plots)
        .replace("{{data}}", told)
    )


def _cards(found: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
    """What the grid shows: one card an edit, a player each of its source and its methods, and a contact sheet."""
    edits: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        edits.setdefault((row.video, row.edit), []).append(row)
    files = {row.source for row in found} | {row.file for row in found}
    media = Media(folder, embed=fit_in_a_page(files))
    cards = []
    for number, own in enumerate(edits.values()):
        first = own[0]
        name = f"{first.video}--{first.edit}"
        cards.append(
            {
                "video": first.video,
                "edit": first.edit,
                "category": first.category,
                "caption": first.caption,
                "prompt": first.prompt,
                "source": media.video(first.source, f"source--{first.video}.mp4"),
                "made": {
                    row.method: {"file": media.video(row.file, f"{row.method}--{name}.mp4"), "values": row.values}
                    for row in own
                },
                "sheet": media.put(_sheet(own), "image/jpeg", f"sheets/{name}.jpg") if number < MOST_SHEETS else None,
            }
        )
    return cards


def _sheet(own: Sequence[Row]) -> bytes:
    """A contact sheet of an edit, as JPEG: the source, and each method's."""
    clips = [video.read(own[0].source).frames, *(video.read(row.file).frames for row in own)]
    captions = [f"source: {own[0].caption}", *(f"{row.method}: {row.prompt}" for row in own)]
    picture = Image.fromarray(contact_sheet.contact_sheet(clips, captions, columns=6))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    return file.getvalue()
