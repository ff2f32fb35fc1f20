"""What raters answered to a study: one file a rater, looked at before it counts."""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from tav_opt import schemas
from tav_opt.command import printable
from tav_opt.config import InputError
from tav_opt.files import read_json, write_json
from tav_opt.suite.study import ANSWERS, Question, Side, Study

Hexadecimal = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{1,64}\z")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Answer(_Strict):
    """One question of one pair."""

    item: Hexadecimal
    question: Question
    chosen: Side
    """The video that is better."""
    left: Side
    """The video that was shown on the left."""


class Answers(_Strict):
    """One rater's, as the page writes them."""

    study: Hexadecimal
    rater: Annotated[str, StringConstraints(min_length=1, max_length=40)]
    token: Hexadecimal
    """Drawn by the rater's browser: who sends answers again has the same."""
    at: Annotated[str, StringConstraints(max_length=40)]
    """When they were given, as ISO 8601 has it."""
    answers: Annotated[list[Answer], Field(max_length=1_000_000)]

    @property
    def file_name(self) -> str:
        """One a rater, whatever letters a name has."""
        return f"{hashlib.sha256(self.rater.encode()).hexdigest()[:16]}.json"


def checked(found: object, study: Study, where: object) -> Answers:
    """Answers as JSON has them; raises InputError for those to another study, and for one question answered twice."""
    schemas.check(Answers, found, where)
    answers = Answers.model_validate(found)
    if answers.study != study.study:
        raise InputError(f"{where}: answers to study {answers.study}, this one is {study.study}")
    try:
        datetime.fromisoformat(answers.at)
    except ValueError:
        raise InputError(f"{where}: at {answers.at!r} is no time as ISO 8601 has it") from None
    known, seen = {item.item for item in study.items}, set[tuple[str, str]]()
    for answer in answers.answers:
        if answer.item not in known:
            raise InputError(f"{where}: item {answer.item!r} is not of this study")
        if (answer.item, answer.question) in seen:
            raise InputError(f"{where}: item {answer.item}, {answer.question}: answered twice")
        seen.add((answer.item, answer.question))
    return answers


def read_all(folder: Path, study: Study) -> list[Answers]:
    """All files of `folder`'s answers, by when they were given; raises InputError for two of one rater."""
    found: dict[str, tuple[Path, Answers]] = {}
    for path in sorted((folder / ANSWERS).glob("*.json")):
        answers = checked(read_json(path), study, path)
        if answers.rater in found:
            other = found[answers.rater][0]
            raise InputError(f"{other} and {path} are both of rater {answers.rater!r}: keep one")
        found[answers.rater] = path, answers
    return sorted((a for _, a in found.values()), key=lambda a: (datetime.fromisoformat(a.at).timestamp(), a.rater))


def keep(folder: Path, answers: Answers) -> None:
    """Writes a rater's answers, in the place of those that the same browser sent before.

    Raises InputError where someone else of that name has answered.
    """
    place, others = folder / ANSWERS / answers.file_name, []
    for path in sorted((folder / ANSWERS).glob("*.json")):
        before = read_json(path)
        if isinstance(before, dict) and before.get("rater") == answers.rater:
            if before.get("token") != answers.token:
                raise InputError(
                    f"{printable(answers.rater)} has answered already: if that was not you, take another name"
                )
            others.append(path)
    write_json(place, answers.model_dump())
    for path in others:
        if path != place:  # a file that was put there by hand
            path.unlink()
