"""`tav-opt study`, `tav-opt study serve|tally`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from tav_opt.command import printable
from tav_opt.config import Seed, Within, check_numbers

PROG = "tav-opt study"


@dataclass(frozen=True, kw_only=True)
class MakeStudy:
    """Write a page that asks raters which of two edits is better, of an evaluation's edits; `study serve FOLDER` takes
    their answers, `study tally FOLDER` counts them."""

    run: Positional[Path]
    """Folder of results of `tav-opt evaluate`."""
    against: tuple[str, ...]
    """Methods that ours is compared with, one or more, as the evaluation calls them."""
    method: str = "ours"
    """Whose preference is counted."""
    out: Path = Path("study")
    """Folder of the study: page/ for raters, study.json (the key), answers/."""
    raters: Annotated[int, Within(1, 999)] = 5
    """Answers that every item takes: an odd number."""
    seed: Seed = 33
    """Of which video is whose."""


@dataclass(frozen=True, kw_only=True)
class ServeStudy:
    """Serve a study's page to raters, and keep the answers that they send."""

    study: Positional[Path]
    """Folder of the study."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all. Whoever reaches it may answer, without encryption."""
    port: Annotated[int, Within(0, 65535)] = 8765
    """Port to listen at; 0: any that is free."""


@dataclass(frozen=True, kw_only=True)
class TallyStudy:
    """Count a study's answers: preference by majority and by votes, with intervals, and how far raters agree."""

    study: Positional[Path]
    """Folder of the study, whose answers/ holds one file a rater."""


def run(arguments: Sequence[str]) -> int:
    """Ask raters which of two edits is better: make a study, serve it, count it."""
    match arguments[:1]:
        case ["serve"]:
            _serve(tyro.cli(ServeStudy, prog=f"{PROG} serve", args=arguments[1:]))
        case ["tally"]:
            _tally(tyro.cli(TallyStudy, prog=f"{PROG} tally", args=arguments[1:]))
        case _:
            _make(tyro.cli(MakeStudy, prog=PROG, args=arguments))
    return 0


def _make(args: MakeStudy) -> None:
    check_numbers(args)
    from tav_opt.suite import study

    made, page = study.make(args.run, args.against, args.out, method=args.method, raters=args.raters, seed=args.seed)
    pairs = f"{len(made.items)} pair{'s' * (len(made.items) > 1)}"
    print(f"{pairs}, {args.raters} raters each; answers go to {args.out / study.ANSWERS}")
    print(page)


def _serve(args: ServeStudy) -> None:
    check_numbers(args)
    from tav_opt.suite import study_server

    study_server.serve(args.study, args.host, args.port, lambda line: print(printable(line), flush=True))


def _tally(args: TallyStudy) -> None:
    from tav_opt.files import write_json
    from tav_opt.suite import rater_answers, study, tally

    asked = study.read(args.study)
    found = tally.tally(asked, rater_answers.read_all(args.study, asked))
    write_json(args.study / "tally.json", asdict(found))
    print(tally.as_markdown(found))
