"""What a study's raters prefer: majorities, votes, how sure they are and how far raters agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tav_opt.config import InputError
from tav_opt.suite.intervals import fleiss_kappa, grouped
from tav_opt.suite.rater_answers import Answers
from tav_opt.suite.study import QUESTIONS, Item, Study


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Of one question, ours against one other method."""

    against: str
    question: str
    items: int
    """That as many raters answered as the study asks."""
    preferred: float
    """Part of the items whose majority prefers ours."""
    low: float | None
    """Of its 95 % bootstrap interval, whole videos drawn anew; None, as `high` is, where all items are of one video."""
    high: float | None
    votes: float
    """Part of all votes that prefer ours."""
    kappa: float | None
    """Fleiss' agreement beyond chance; None where every vote is the same."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What a study came to."""

    study: str
    method: str
    raters: int
    """Who answered anything."""
    left: float
    """Part of the answers that chose the video on the left; far from a half, raters did not look."""
    unfinished: int
    """Items that too few raters have answered in one question or both: they are left out there."""
    unneeded: int
    """Answers beyond those that the study asks of an item: the latest, left out."""
    preferences: tuple[Preference, ...]


def tally(study: Study, answers: Sequence[Answers]) -> Tally:
    """Counts answers, the earliest of each item as far as the study asks for them.

    `answers` in the order in which they were given. Raises InputError where no item has as many as the study asks for.
    """
    votes, unneeded = _votes(study, answers)
    every = [answer for rater in answers for answer in rater.answers]
    preferences = [
        found
        for against in study.against
        for question in QUESTIONS
        if (found := _preference(study, against, question, votes)) is not None
    ]
    if not preferences:
        raise InputError(f"no item has the {study.raters} answers that it takes: {len(answers)} raters have answered")
    short = {item.item for item in study.items for q in QUESTIONS if len(votes[item.item, q]) < study.raters}
    return Tally(
        study=study.study,
        method=study.method,
        raters=len(answers),
        left=sum(answer.chosen == answer.left for answer in every) / len(every),
        unfinished=len(short),
        unneeded=unneeded,
        preferences=tuple(preferences),
    )


def _votes(study: Study, answers: Sequence[Answers]) -> tuple[dict[tuple[str, str], list[bool]], int]:
    """For each item and question who chose ours, as many as are asked for; and how many were too many."""
    items = {item.item: item for item in study.items}
    votes: dict[tuple[str, str], list[bool]] = {(item, question): [] for item in items for question in QUESTIONS}
    unneeded = 0
    for rater in answers:
        for answer in rater.answers:
            own = votes[answer.item, answer.question]
            if len(own) < study.raters:
                own.append(getattr(items[answer.item], answer.chosen) == study.method)
            else:
                unneeded += 1
    return votes, unneeded


def _preference(
    study: Study, against: str, question: str, votes: dict[tuple[str, str], list[bool]]
) -> Preference | None:
    own = [
        (item, cast)
        for item in study.items
        if item.other(study.method) == against and len(cast := votes[item.item, question]) == study.raters
    ]
    if not own:
        return None
    majorities: dict[str, list[float]] = {}
    for item, cast in own:
        majorities.setdefault(item.video, []).append(float(_majority(item, cast)))
    mean, low, high = grouped(majorities)
    alone = len(majorities) < 2
    return Preference(
        against=against,
        question=question,
        items=len(own),
        preferred=mean,
        low=None if alone else low,
        high=None if alone else high,
        votes=sum(sum(cast) for _, cast in own) / (len(own) * study.raters),
        kappa=None if study.raters < 2 else fleiss_kappa([[sum(cast), study.raters - sum(cast)] for _, cast in own]),
    )


def _majority(item: Item, cast: Sequence[bool]) -> bool:
    assert len(cast) % 2, f"{item.item}: an even number has no majority"
    return sum(cast) > len(cast) / 2


def as_markdown(found: Tally) -> str:
    """The table, and what has to be known with it."""
    lines = [
        f"| {found.method} preferred to | question | items | by majority | 95 % interval | votes | Fleiss' kappa |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in found.preferences:
        between = "one video" if one.low is None or one.high is None else f"{one.low:.1%} … {one.high:.1%}"
        kappa = "all alike" if one.kappa is None else f"{one.kappa:.2f}"
        told = f"{one.items} | {one.preferred:.1%} | {between} | {one.votes:.1%} | {kappa}"
        lines.append(f"| {one.against} | {one.question} | {told} |")
    said = [f"{found.raters} raters; {found.left:.1%} of their answers chose the video on the left."]
    if found.unfinished:
        said.append(f"{found.unfinished} items have too few answers, and are left out where they lack them.")
    if found.unneeded:
        said.append(f"{found.unneeded} answers were more than an item takes: the latest are left out.")
    return "\n".join([*lines, "", *said])
