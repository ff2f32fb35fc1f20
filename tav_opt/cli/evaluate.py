"""`tav-opt evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from tav_opt.cli.common import Dtype
from tav_opt.config import InputError, Within, check_numbers

if TYPE_CHECKING:
    from tav_opt.suite.suite_types import Suite


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Tune, invert, edit and measure a suite's videos, then write a report; run again, it goes on where it ended."""

    suite: Positional[Path]
    """YAML file (docs/suite.md)."""
    out: str = "runs"
    """Folder of all results, or a URL that fsspec writes, as s3://bucket/folder (pip install s3fs); units that are
    whole there are not done again."""
    dry: bool = False
    """Only say what it takes: units, hours and GiB, as an estimate; videos need not be there."""
    teraflops: Annotated[float, Within(0.001, 10**6)] = 250.0
    """For --dry: what a GPU is assumed to compute, in 10^12 operations a second."""
    report: bool = False
    """Only write the report of what is done by now, as while another process evaluates; nothing is computed."""
    tgve: Path | None = None
    """Folder for each method's edits in the layout that TGVE's own evaluation script reads; for its manifest."""
    workers: Annotated[int, Within(1, 4096)] | None = None
    """Processes on this machine, or on --ray's cluster, that do units side by side (extra `ray`)."""
    ray: str | None = None
    """Address of a Ray cluster, whose nodes all see --out; workers: as many as it has room for."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU where there is one."""
    dtype: Dtype = "auto"
    """Of the networks; auto: float16 on GPUs, float32 elsewhere."""


def run(arguments: Sequence[str]) -> int:
    """Tune, edit, measure and compare many clips."""
    args = tyro.cli(Evaluate, prog="tav-opt evaluate", args=arguments)
    check_numbers(args)
    _check_together(args)
    from tav_opt.suite.suite_file import read_suite

    suite = read_suite(args.suite)
    if args.dry:
        return _dry(args, suite)
    from tav_opt.suite import evaluating

    where = evaluating.Where(device=args.device, dtype=args.dtype, workers=args.workers, ray=args.ray)
    with evaluating.shown() as show:
        outcome = evaluating.evaluate(suite, args.out, where, show, tgve=args.tgve, only_report=args.report)
    for name, fault in outcome.faults.items():
        print(f"tav-opt evaluate: {name}: {fault}", file=sys.stderr)
    if outcome.kept_back:
        print(f"tav-opt evaluate: {len(outcome.kept_back)} units need what failed", file=sys.stderr)
    print(outcome.report)
    if outcome.report_url is not None:
        print(outcome.report_url)
    return 1 if outcome.faults else 0


def _check_together(args: Evaluate) -> None:
    """Raises InputError for an option that would do nothing."""
    only = "dry" if args.dry else "report" if args.report else None
    idle = {"dry": ("report", "tgve", "workers", "ray"), "report": ("workers", "teraflops"), None: ("teraflops",)}[only]
    if given := next((name for name in idle if getattr(args, name) != getattr(Evaluate, name)), None):
        why = f"with --{only}: nothing is computed" if only else "without --dry"
        raise InputError(f"--{given} does nothing {why}")


def _dry(args: Evaluate, suite: Suite) -> int:
    from tav_opt.suite import planning
    from tav_opt.suite.units import Place, missing_files, units

    on_gpus = Place(device="cuda", dtype="float16")
    plan = planning.plan_of(suite, units(suite, on_gpus, hashed=False), on_gpus)
    edits = f"{len(suite.videos)} videos, {suite.edits} edits, {len(suite.methods)} methods"
    print(f"{suite.file}: {edits}\n\n{planning.table(plan, args.teraflops)}")
    if gone := missing_files(suite):
        print(f"\n{len(gone)} files that it needs are not here, the first: {gone[0]}")
    return 0
