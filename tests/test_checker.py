"""benchmarks/checker.py: that its judge convicts what no state of a repository allows, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import supervised
from exported import export_once

from benchmarks import history
from benchmarks.history import Event, faults

ROOT = Path(__file__).parents[1]


def change(began: float, ended: float, version: str | None, clip: str = "one") -> Event:
    return Event(kind="change", who="keeper", began=began, ended=ended, clip=clip, version=version)


def edit(began: float, ended: float, answer: str, clip: str = "one") -> Event:
    """Frames are called as the versions that they may be of; `-` is NOT_FOUND, `!` an answer of another kind."""
    outcome = {"-": "NOT_FOUND", "!": "UNAVAILABLE"}.get(answer, "OK")
    return Event(
        kind="edit", who="1", began=began, ended=ended, clip=clip, outcome=outcome, settings="x", answer=answer
    )


def judged(*events: Event) -> list[str]:
    return faults(events, lambda event: {*event.answer} - {"?"})


ADDED, REPLACED, REMOVED = change(1, 2, "a"), change(5, 6, "b"), change(9, 10, None)
LIFE = (ADDED, REPLACED, REMOVED)


@pytest.mark.parametrize(
    "answers",
    [
        [(0, 0.5, "-"), (3, 4, "a"), (7, 8, "b"), (11, 12, "-")],
        [(1.1, 1.2, "-"), (1.5, 1.6, "a"), (5.5, 5.6, "a"), (5.8, 5.9, "b"), (9.5, 9.6, "-")],
        [(0, 12, "a"), (0, 12, "b"), (0, 12, "-")],
        [(3, 5.5, "a"), (3, 5.5, "b"), (5.4, 5.9, "a")],  # they overlap
        [(3, 4, "ab"), (7, 8, "ab"), (5.2, 5.3, "ab"), (5.4, 5.5, "a")],  # whose it is cannot be told
        [(3, 4, "!"), (11, 12, "!")],
    ],
)
def test_what_a_repository_allows_is_allowed(answers):
    assert judged(*LIFE, *(edit(*answer) for answer in answers)) == []


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([(11, 12, "b")], "b, where there was no clip"),  # removed, and acknowledged
        ([(7, 8, "a")], "a, where there was b"),  # replaced, and acknowledged
        ([(3, 4, "-")], "no clip, where there was a"),
        ([(0, 0.9, "a")], "a, where there was no clip"),  # nobody had added it
        ([(5, 5.9, "-")], "no clip, where there was a, b"),  # replacing is no removing
        ([(3, 4, "?")], "frames of no version"),  # mixed ones
        ([(5.1, 5.3, "b"), (5.4, 5.5, "a")], "a, though a later state had been seen"),
        ([(9.1, 9.2, "-"), (9.3, 9.9, "b")], "b, though a later state had been seen"),
    ],
)
def test_what_no_state_allows_is_found(answers, told):
    (found,) = judged(*LIFE, *(edit(*answer) for answer in answers))
    assert told in found


def test_clips_are_apart_and_a_state_that_comes_again_is_another():
    back = change(13, 14, "a")
    assert judged(*LIFE, back, edit(15, 16, "a"), edit(3, 4, "-", clip="two")) == []
    assert len(judged(*LIFE, back, edit(13.1, 13.2, "a"), edit(13.3, 13.4, "-"))) == 1


def test_a_history_is_kept(tmp_path):
    history.write([*LIFE, edit(3, 4, "a")], tmp_path / "history.jsonl")
    assert history.read(tmp_path / "history.jsonl") == [*LIFE, edit(3, 4, "a")]


@pytest.mark.full
def test_a_minute_of_it_finds_nothing(golden, tmp_path_factory, tmp_path):
    """Amid kills and changes of clips; a history without some of each would prove nothing."""
    supervised.repository(golden, tmp_path_factory.getbasetemp())  # skips where no server is installed
    tuned = export_once(golden, tmp_path_factory.getbasetemp()).checkpoint
    out = tmp_path / "checker.json"
    options = ["--minutes", "1", "--kill-seconds", "10", "--preset", str(tuned), "--out", str(out)]
    done = subprocess.run([sys.executable, "benchmarks/checker.py", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    outcomes = json.loads(out.read_text())["outcomes"]
    assert all(outcomes.get(name, 0) for name in ("edit: OK", "edit: NOT_FOUND", "change: OK", "kill: OK"))
    assert len(history.read(out.with_suffix(".jsonl"))) == sum(outcomes.values())
