"""All that waits for a GPU, in stages: `python benchmarks/gpu/run.py --list`, then `… STAGE… --out DIR`.

Each stage is a process of its own with a limit; its rows are in DIR/results.jsonl as soon as they are known, what it
and its libraries say besides in DIR/log.txt. Whatever becomes of a stage, the next one runs, and the last lines say
what failed. `--dry` runs the stages on a processor with tiny shapes: that all of it runs, and no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from stages import BUDGET_SECONDS, STAGES, Stage  # noqa: E402

from tav_opt import command  # noqa: E402
from tav_opt.config import InputError  # noqa: E402

RESULTS, LOG = "results.jsonl", "log.txt"
PURE = "-none-any.whl"
FAULTS_STATUS = 1
"""Of a stage that found faults, which its rows tell."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a stage."""

    stage: Stage
    seconds: float
    rows: int
    why: str = ""
    """Why it failed; empty where it did not."""

    def __str__(self) -> str:
        became = f"FAILED, {self.why}" if self.why else "done"
        return f"{self.stage.name}: {became}; {self.rows} rows in {self.seconds:.0f} s"


def main(arguments: list[str]) -> int:
    """Runs the chosen stages in the order of the table; 1 where one of them failed."""
    asked = _parser().parse_args(arguments)
    if asked.list:
        print(listing())
        return 0
    stages = chosen(asked.stages, dry=asked.dry)
    if asked.out is None:
        raise InputError("no --out: give the folder that shall hold results.jsonl and log.txt")
    asked.out.mkdir(parents=True, exist_ok=True)
    with unpacked(asked.wheels) as wheels:
        outcomes = [run(stage, asked.out, wheels, dry=asked.dry) for stage in stages]
    print("\n" + "\n".join(map(str, outcomes)))
    return int(any(outcome.why for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/run.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="of --list; a dry run takes all unless told")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for {RESULTS} and {LOG}, which are added to")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="pure-Python wheels of what is missing here")
    parser.add_argument("--list", action="store_true", help="print the table of stages")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a processor; no figure counts")
    return parser


def listing() -> str:
    """The table as Markdown."""
    rows = ["| stage | limit s | what | goals |", "|---|---:|---|---|"]
    for stage in STAGES:
        goals = "; ".join(f"{goal.row}, {goal.figure} {goal}" for goal in stage.goals)
        rows.append(f"| {stage.name} | {stage.seconds} | {stage.says} | {goals} |")
    return "\n".join([*rows, "", f"The limits of one call may add up to {BUDGET_SECONDS} s."])


def chosen(names: Sequence[str], *, dry: bool) -> list[Stage]:
    """The stages of these names in the table's order.

    Raises InputError for names it does not have, for none, and for limits that add up to more than one call may take.
    """
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"stage {unknown[0]!r} is not {', '.join(known)}")
    if not names and not dry:
        raise InputError(f"no stage: give one or more of {', '.join(known)}")
    stages = [stage for stage in STAGES if stage.name in names or not names]
    total = sum(stage.seconds for stage in stages)
    if total > BUDGET_SECONDS and not dry:
        limits = " + ".join(f"{stage.name} {stage.seconds}" for stage in stages)
        raise InputError(f"{limits} = {total} s, over the {BUDGET_SECONDS} s of one call: take fewer stages")
    return stages


@contextmanager
def unpacked(wheels: Path | None) -> Iterator[Path | None]:
    """The wheels of a folder as a folder to import from; raises InputError for one that is not pure Python."""
    if wheels is None:
        yield None
        return
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise InputError(f"{wheels} holds no wheels: `make gpu-wheels` fetches them")
    if compiled := [wheel.name for wheel in found if not wheel.name.endswith(PURE)]:
        raise InputError(f"{compiled[0]} is no pure-Python wheel (…{PURE}): it may not fit the machine")
    with tempfile.TemporaryDirectory() as folder:
        for wheel in found:
            zipfile.ZipFile(wheel).extractall(folder)
        yield Path(folder)


def run(stage: Stage, out: Path, wheels: Path | None, *, dry: bool) -> Outcome:
    """One stage in a process of its own, which ends at the limit with all that it started."""
    results, started = out / RESULTS, time.monotonic()
    before = len(_rows(results))
    _end_the_line(results)
    print(f"{stage.name}: {stage.says} (at most {stage.seconds} s)", flush=True)
    arguments = [str(HERE / "one_stage.py"), stage.name, stage.where, str(results.absolute())]
    with (out / LOG).open("a", encoding="utf-8") as log:
        log.write(f"\n=== {stage.name}\n")
        log.flush()
        program = [sys.executable, *arguments, *(["--dry"] if dry else [])]
        ended = _ended(program, _environment(stage, wheels, dry), log, stage)
    rows = [row for row in _rows(results)[before:] if row["stage"] == stage.name]
    faults = [f"{row['row']}: {row['fault']}" for row in rows if "fault" in row]
    reasons = [ended] if ended and not (faults and ended == _status(FAULTS_STATUS)) else []
    reasons += [faults[0] + (f", and {len(faults) - 1} more" if faults[1:] else "")] if faults else []
    return Outcome(stage=stage, seconds=time.monotonic() - started, rows=len(rows), why="; ".join(reasons))


def _status(status: int) -> str:
    return f"ended with status {status} (see {LOG})"


def _ended(arguments: list[str], environment: dict[str, str], log: Any, stage: Stage) -> str:
    """Starts a process, waits for it, and says why it failed, if it did."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        status = process.wait(stage.seconds)
    except subprocess.TimeoutExpired:
        return f"ended at its limit of {stage.seconds} s"
    finally:
        _kill_group(process)
    if status < 0:
        return f"killed by {signal.Signals(-status).name} (see {LOG})"
    return "" if status == 0 else _status(status)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The process and what it left running; its session is its own."""
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(stage: Stage, wheels: Path | None, dry: bool) -> dict[str, str]:
    """The package, the benchmarks and the wheels to be imported; only a dry run interprets kernels."""
    places = [str(ROOT / "benchmarks"), str(ROOT), *([str(wheels)] if wheels else [])]
    places += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    own = {
        "PYTHONPATH": os.pathsep.join(places),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUTF8": "1",
    }
    of_dry_runs = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if stage.interpreted:
        of_dry_runs["TRITON_INTERPRET"] = "1"
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    return kept | own | (of_dry_runs if dry else {})


def _rows(results: Path) -> list[dict[str, Any]]:
    """What is in the file; a process that is killed may leave half a line."""
    rows = []
    for line in results.read_text(encoding="utf-8", errors="replace").splitlines() if results.exists() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def _end_the_line(results: Path) -> None:
    """After half a row, so that the next one is whole."""
    if results.exists() and (text := results.read_text(encoding="utf-8", errors="replace")) and not text.endswith("\n"):
        with results.open("a", encoding="utf-8") as file:
            file.write("\n")


if __name__ == "__main__":
    sys.exit(command.run("benchmarks/gpu/run.py", main))
