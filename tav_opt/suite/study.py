"""A study of raters: pairs of edits, ours and another method's, on a page that does not say which is which."""

from __future__ import annotations

import hashlib
import html
import io
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tav_opt.config import InputError
from tav_opt.files import check_place, read_object, replacing, write_json
from tav_opt.suite import rows
from tav_opt.suite.media import Media, fit_in_a_page
from tav_opt.suite.rows import Row

PAGE = Path(__file__).with_name("study.html")
KEY, ANSWERS, PAGE_FOLDER = "study.json", "answers", "page"
"""Of a study's folder: which video is whose; what raters answered; what they see."""
Question = Literal["frame consistency", "textual alignment"]
QUESTIONS: dict[Question, str] = {
    "frame consistency": "Which video is more consistent from frame to frame?",
    "textual alignment": "Which video shows better what the text says?",
}
"""The paper's two, asked of every pair (section 4.2), by the metric that each is the human counterpart of."""
Side = Literal["a", "b"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """A pair of videos of one edit, as the key has it."""

    item: str
    """What the page and the answers call it."""
    video: str
    edit: str
    category: str
    prompt: str
    a: str
    """Method of the one video."""
    b: str
    """Method of the other."""

    def other(self, method: str) -> str:
        """What a method is compared with."""
        return self.b if self.a == method else self.a


@dataclass(frozen=True, kw_only=True)
class Study:
    """What raters are asked, and the key to their answers."""

    study: str
    """Hash of all that is asked: answers to another study are refused."""
    name: str
    method: str
    """Whose preference is counted."""
    against: tuple[str, ...]
    raters: int
    """Answers an item: an odd number, so that each has a majority."""
    items: tuple[Item, ...]


def make(run: Path, against: Sequence[str], out: Path, *, method: str, raters: int, seed: int) -> tuple[Study, Path]:
    """Writes a study of an evaluation's edits and returns it with its page.

    Each edit that both methods made is a pair, with each method of `against`; which of the two is a and which b is
    drawn by `seed`, and the page draws order and sides for every rater anew. `out/page/` is for raters; the key beside
    it is not. Raises InputError where a method is not there, or `out` holds another study.
    """
    if raters % 2 == 0:
        raise InputError(f"raters {raters}: give an odd number, so that every item has a majority")
    check_place(out / KEY)
    found = rows.reported(run)
    pairs = _pairs(found, method, against)
    study = _keyed(run.absolute().name, pairs, method, against, raters, seed)
    if (out / PAGE_FOLDER).exists() and not (out / KEY).exists():
        raise InputError(f"{out} holds another {PAGE_FOLDER}/: choose another --out")
    if (out / KEY).exists() and read(out).study != study.study:
        raise InputError(f"{out} holds another study: choose another --out, its answers would not fit")
    write_json(out / KEY, asdict(study))
    (out / ANSWERS).mkdir(exist_ok=True)
    with replacing(out / PAGE_FOLDER) as folder:
        folder.mkdir()
        files = [(a.file, b.file) for a, b in _sided(pairs, study)]
        media = Media(folder, embed=fit_in_a_page({file for pair in files for file in pair}))
        (folder / "index.html").write_text(_page(study, files, media), encoding="utf-8")
    return study, out / PAGE_FOLDER / "index.html"


def read(folder: Path) -> Study:
    """The key of a study; raises InputError for a folder that holds none."""
    if not (folder / KEY).is_file():
        raise InputError(f"{folder} holds no study: `tav-opt study RUN --against METHOD --out {folder}` makes one")
    found = read_object(folder / KEY)
    try:
        items = tuple(Item(**item) for item in found.pop("items"))
        against = tuple(found.pop("against"))
        return Study(items=items, against=against, **found)
    except (TypeError, KeyError):
        raise InputError(f"{folder / KEY} is no key of a study") from None


def _pairs(found: Sequence[Row], method: str, against: Sequence[str]) -> list[tuple[Row, Row]]:
    """Our row and the other's of each edit that both made."""
    if not against:
        raise InputError("--against: give one method or more")
    there = list(dict.fromkeys(row.method for row in found))
    for name in (method, *against):
        if name not in there:
            raise InputError(f"no edit by {name!r} is there: the evaluation has {', '.join(there) or 'none'}")
    if method in against:
        raise InputError(f"{method!r} would be compared with itself: --method is one, --against others")
    if len(set(against)) < len(against):
        raise InputError(f"--against {' '.join(against)}: each method once")
    made = {(row.method, row.video, row.edit): row for row in found}
    ours = [row for row in found if row.method == method]
    pairs = [
        (row, made[name, row.video, row.edit])
        for name in against
        for row in ours
        if (name, row.video, row.edit) in made
    ]
    if not pairs:
        raise InputError(f"no edit was made both by {method!r} and by {' or '.join(map(repr, against))}")
    return pairs


def _keyed(
    name: str, pairs: Sequence[tuple[Row, Row]], method: str, against: Sequence[str], raters: int, seed: int
) -> Study:
    """Which of each pair is a, and names that say nothing."""
    shown = [[row.method, row.video, row.edit, row.prompt, _content(row.file)] for pair in pairs for row in pair]
    study = hashlib.sha256(json.dumps([shown, list(QUESTIONS), raters, seed]).encode()).hexdigest()[:16]
    drawn = random.Random(study)
    items = []
    for ours, other in pairs:
        a, b = drawn.sample((ours, other), 2)
        items.append(
            Item(
                item=f"{drawn.getrandbits(48):012x}",
                video=ours.video,
                edit=ours.edit,
                category=ours.category,
                prompt=ours.prompt,
                a=a.method,
                b=b.method,
            )
        )
    drawn.shuffle(items)
    return Study(study=study, name=name, method=method, against=tuple(against), raters=raters, items=tuple(items))


def _content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _sided(pairs: Sequence[tuple[Row, Row]], study: Study) -> list[tuple[Row, Row]]:
    """The rows of a and b of each item, in the order of the items."""
    made = {(row.method, row.video, row.edit): row for pair in pairs for row in pair}
    return [(made[item.a, item.video, item.edit], made[item.b, item.video, item.edit]) for item in study.items]


def _page(study: Study, files: Sequence[tuple[Path, Path]], media: Media) -> str:
    items = []
    for item, pair in zip(study.items, files, strict=True):
        shown: dict[str, Any] = {"item": item.item, "prompt": item.prompt}
        for side, file in zip(("a", "b"), pair, strict=True):
            shown[side] = media.put(_nameless(file), "video/mp4", f"videos/{item.item}{side}.mp4")
        items.append(shown)
    data = {"study": study.study, "questions": QUESTIONS, "items": items}
    told = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    page = PAGE.read_text(encoding="utf-8")
    return page.replace("{{title}}", html.escape("Which video is better?")).replace("{{data}}", told)


def _nameless(file: Path) -> bytes:
    """An MP4's pictures without what it says of its method."""
    import av

    made = io.BytesIO()
    with av.open(str(file)) as source, av.open(made, "w", format="mp4") as target:
        pictures = source.streams.video[0]
        copy = target.add_stream_from_template(pictures)
        for packet in source.demux(pictures):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    return made.getvalue()
