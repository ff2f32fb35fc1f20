"""What each option of an edit is good for and costs, beside an edit without any: the part `options` of quality.py.

Every option is a row of data; presets and what `--keep` takes are those of config.py. An option runs in a process of
its own, by the best engine there is, so that its peak of memory is its own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import apart, peak_of
from crossings import DEMO, Source, background_psnr, exported, scores, sources
from PIL import Image

from tav_opt import editing
from tav_opt.config import KEEP, PRESETS, EditConfig, InputError
from tav_opt.demo import world
from tav_opt.demo.judge import Judge
from tav_opt.engines.registry import open_clip
from tav_opt.export.controlled import CONTROLLED
from tav_opt.files import read_json, write_json
from tav_opt.video import contact_sheet
from tav_opt.video.restoring import Shape, restored

STEPS = 20
"""Of sampling and inversion, but for the presets, which have their own and the inversion that is kept."""
ASKED: dict[str, tuple[dict[str, str], ...]] = {
    "rabbit": ({"subject": "cat"},),
    "horse": ({"style": "grey"},),
}
WIDE = Shape(height=180, width=320)
"""What a source is shown at that the clip is a part of."""
KEPT_BY = {"motion": "style"}
"""Edits that a `--keep` is for, where they do not change the subject."""
COLUMNS = ("right frames", "track", "unrest around", "PSNR outside", "seconds", "peak MiB")
HEAD = f"| option | edits | {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * len(COLUMNS)}"


@dataclass(frozen=True, kw_only=True)
class Option:
    """What an edit is told beside its prompt; `{old}` and `{new}` in a text are the words that differ."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of EditConfig."""
    preset: str | None = None
    of: tuple[str, ...] = ("subject",)
    """What its edits change."""
    masked: bool = False
    """A square about the subject alone may change."""
    rounds: int = 1
    """How often the clip is played, there and back: a source so many times as long; even, but for 1."""
    at_once: int = 1
    """Windows of a long clip in one call."""
    size: Shape | None = None
    """At which it is written."""

    @property
    def name(self) -> str:
        """As on the command line."""
        found = [f"--{name.replace('_', '-')} {_told(value)}".strip() for name, value in self.settings.items()]
        found += [f"--preset {self.preset}"] if self.preset else []
        found += ["--mask square.png"] if self.masked else []
        found += [f"--frames {24 * self.rounds}"] if self.rounds > 1 else []
        found += [f"--windows-at-once {self.at_once}"] if self.at_once > 1 else []
        found += ["--size source"] if self.size else []
        return " ".join(found) or "none"

    def config(self, source: Source, change: Mapping[str, str]) -> EditConfig:
        """The settings of one edit."""
        prompt = world.prompt(source.edited(dict(change)))
        old, new = (_words(text, other) for text, other in ((source.caption, prompt), (prompt, source.caption)))
        plain = replace(DEMO.edit_config(prompt), prompts=(prompt,))
        if self.preset:
            return replace(plain, **PRESETS[self.preset])  # type: ignore[index]
        given = {name: _filled(value, old, new) for name, value in self.settings.items()}
        return replace(plain, **{"steps": STEPS, "inversion_steps": STEPS} | given)


def _told(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else "" if value is True else str(value)


def _filled(value: Any, old: str, new: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_filled(one, old, new) for one in value)
    return value.format(old=old, new=new) if isinstance(value, str) else value


def _words(text: str, other: str) -> str:
    """The first word that the other text has not."""
    return next((word for word in text.split() if word not in other.split() and len(word) > 2), text.split()[-1])


OPTIONS: tuple[Option, ...] = (
    Option(of=("subject", "style")),
    Option(settings={"inversion_iterations": 5}),
    Option(settings={"replace_cross": 0.5}),
    Option(settings={"replace_self": 0.5}),
    Option(settings={"replace_self": 0.5, "direct_inversion": True}),
    Option(settings={"replace_cross": 0.5, "source_prompt": "a picture of a {old}"}),
    Option(settings={"blend_words": ("{old}", "{new}")}),
    Option(settings={"word_weights": ("{new}:3",)}),
    *(Option(settings={"keep": name}, of=(KEPT_BY.get(name, "subject"),)) for name in KEEP),
    Option(masked=True),
    Option(rounds=2),
    Option(rounds=2, at_once=3),
    Option(size=WIDE),
    *(Option(preset=name) for name in PRESETS),
)


@dataclass(frozen=True, kw_only=True)
class Edited:
    """What came of one edit."""

    clip: str
    change: dict[str, str]
    prompt: str
    frames: np.ndarray
    """Of the clip's size, those of the first round."""
    seconds: float
    """Of one core, which others of the machine do not lengthen."""
    mib: float
    """The process's peak."""


def measured(
    judge: Judge, folder: Path, out: Path, run: Mapping[str, Any], only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A row an option, printed and written as they come; a picture of each edit lies in the folder.

    Rows that were written before stay; where names are given, `only` those are measured, and the first where it lacks.
    `run` says what was run and where, and stands in each row that it measured. Raises InputError for an unknown name.
    """
    by_name = {source.name: source for source in sources() if source.name in ASKED}
    if unknown := sorted(set(only) - {option.name for option in OPTIONS}):
        raise InputError(f"no option {unknown[0]!r}")
    head = read_json(out) if out.is_file() else {"rows": []}
    before = {row["option"]: {name: head[name] for name in run if name in head} | row for row in head["rows"]}
    rows = list[dict[str, Any]]()
    lacking = [option for option in OPTIONS if option.name in only or (option.name not in before and not only)]
    for name in by_name if lacking or OPTIONS[0].name not in before else ():
        exported(by_name[name], folder, further=[CONTROLLED])
    print(f"\n### options\n\n{HEAD}", flush=True)
    for option in OPTIONS:
        row = None if option.name in only else before.get(option.name)
        if row is None and rows and only and option.name not in only:
            continue
        if row is None:
            found = apart(partial(edited, option, folder))
            judged = [_judged(judge, one, by_name[one.clip]) for one in found]
            row = _row(option, judged, rows[0]["edits"] if rows else judged) | run
            for one in found:
                shown = contact_sheet.contact_sheet([one.frames], [f"{option.name}: {one.prompt}"], 4)
                Image.fromarray(shown).save(folder / f"option-{OPTIONS.index(option):02}-{one.clip}.png")
        rows.append(row)
        print(line(row), flush=True)
        write_json(out, {"steps": STEPS, "rows": rows})
    return rows


def edited(option: Option, folder: Path) -> list[Edited]:
    """In a process of its own: its edits of the exported clips."""
    found = []
    for source in sources():
        for change in ASKED.get(source.name, ()):
            if set(change) <= set(option.of):
                found.append(_edited(option, source, change, folder))
    return found


def _edited(option: Option, source: Source, change: dict[str, str], folder: Path) -> Edited:
    engine = open_clip(folder / "repository", source.name, threads=1)
    config, there = option.config(source, change), source.clip.frames
    turns = [there, there[::-1]] * (option.rounds // 2)
    long = np.concatenate(turns) if turns else None
    mask = ~source.beyond if option.masked else None

    def edit() -> np.ndarray:
        frames = editing.edit(engine, config, frames=long, mask=mask, windows_at_once=option.at_once)[0]
        if option.size:
            restored(frames, option.size)
        return frames[: len(there)]

    began = time.process_time()
    mib, frames = peak_of(edit)
    seconds = time.process_time() - began
    prompt = config.prompts[0]
    return Edited(clip=source.name, change=change, prompt=prompt, frames=frames, seconds=seconds, mib=mib)


def _judged(judge: Judge, one: Edited, source: Source) -> dict[str, Any]:
    found = scores(judge, one.frames, source, one.change)
    kept = {name: float(found[name]) for name in ("right frames", "track", "unrest around")}
    costs = {"seconds": one.seconds, "peak MiB": one.mib}
    told = {"edit": one.prompt, "changes": " ".join(one.change)}
    return told | kept | {"PSNR outside": background_psnr(one.frames, source)} | costs


def _row(option: Option, edits: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of an option's edits, and of the same edits without any."""
    asked = [one["edit"] for one in edits]
    return {
        "option": option.name,
        "of": list(option.of),
        "mean": _mean(edits),
        "without": _mean([one for one in plain if one["edit"] in asked]),
        "edits": edits,
    }


def _mean(edits: list[dict[str, Any]]) -> dict[str, float]:
    return {name: float(np.mean([one[name] for one in edits])) for name in COLUMNS}


def line(row: dict[str, Any]) -> str:
    """Of the table: without the option, and with it."""
    both = (f"{row['without'][name]:.3g} → {row['mean'][name]:.3g}" for name in COLUMNS)
    return f"| `{row['option']}` | {', '.join(row['of'])} | {' | '.join(both)} |"
