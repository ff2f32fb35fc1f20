"""Two checkouts in turn: `python benchmarks/against.py OLD NEW`, say of `git worktree add ../old COMMIT` and `.`.

Each exports the same checkpoint by its own code, and edits and tunes in a process of its own, a piece of work at a time
while the other waits. First the exact edits are compared: where the frames differ by more than rounding nothing is
timed, and the exit status is 1. A ratio is of seconds in turn; above 1, the new one is faster. On a machine that others
use `--clock process` counts the processes' own seconds, of all their threads (OMP_NUM_THREADS=1 and taskset: of one).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from common import Figure, header, machine
from presets import prepare
from tyro.conf import Positional

from tav_opt import command
from tav_opt.config import PRESETS, EngineName, InputError
from tav_opt.demo.vae import psnr
from tav_opt.files import write_json

WORKER = Path(__file__).with_name("against_worker.py")
SAME_DB = 60.0
GOALS = {"exact": 1.25, "fast": 3.0, "draft": 5.0, "tuning step": 1.3}
"""Of the whole edit of the demo's model, 50 steps from the kept inversion, and of a step of tuning, on a processor."""


@dataclass(frozen=True, kw_only=True)
class Against:
    """Whole edits and tuning steps of two checkouts, interleaved."""

    old: Positional[Path]
    new: Positional[Path]
    checkpoint: str = "demo"
    """demo, sd15 (random weights), or a checkpoint's folder that both can read."""
    frames: int = 24
    size: int | None = None
    steps: int = 50
    guidance: float = 2.5
    pairs: int = 5
    """Edits of each kind."""
    tuning_steps: int = 20
    """Of each."""
    engine: EngineName = "onnxruntime"
    """Of the new one; the old one's is onnxruntime, the only one that served."""
    clock: Literal["wall", "process"] = "wall"
    out: Path = Path("benchmarks/results/against.json")


class Worker:
    """A checkout's process, which works when it is asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._told("ready")

    def seconds(self, what: str) -> float:
        """Of one piece of work."""
        self._ask(what)
        return float(self._told("seconds"))

    def peak_mib(self) -> float:
        """The most memory that it held; it has ended then."""
        self._ask("")
        return float(self._told("peak_mib"))

    def _ask(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _told(self, name: str) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # the rest is what libraries print
                return json.loads(line)[name]
        raise InputError(f"a worker ended with {self._process.wait()}: its own words stand above")


def main(config: Against) -> int:
    """Compares, times and prints; returns the exit status."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        ckpt = prepare(config.checkpoint, folder / "base", frames=config.frames, size=config.size, steps=config.steps)
        checkouts = {"old": config.old.resolve(), "new": config.new.resolve()}
        for name, checkout in checkouts.items():
            _export(checkout, ckpt, folder / name, config.engine if name == "new" else "onnxruntime")
        try:
            figures = [*_edits(config, checkouts, ckpt, folder), *_tuning(config, checkouts, ckpt, folder)]
        except WrongFrames as error:
            print(f"nothing was timed: {error}", file=sys.stderr)
            return 1
    what = f"{config.new} ({config.engine}) against {config.old}, {config.checkpoint}, {config.clock} seconds"
    print(header(what))
    print("\n| figure | measured | goal | met |\n|---|---:|---|---|")
    print(*figures, sep="\n")
    write_json(config.out, {"command": " ".join(sys.argv), "machine": machine(), "figures": [vars(f) for f in figures]})
    return 0


class WrongFrames(Exception):
    """The new edit is another than the old one."""


def _environment(checkout: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout)}


def _export(checkout: Path, ckpt: Path, folder: Path, engine: EngineName) -> None:
    command = [sys.executable, "-m", "tav_opt.export", str(ckpt), "--repository", str(folder / "repository")]
    command += ["--name", "against", *(["--target", "compiled"] if engine == "compiled" else [])]
    subprocess.run(command, env=_environment(checkout), cwd=checkout, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def _workers(
    work: str, config: Against, checkouts: Mapping[str, Path], ckpt: Path, folder: Path
) -> Iterator[dict[str, Worker]]:
    """One of each checkout, started one after the other."""
    processes = {}
    try:
        for name, checkout in checkouts.items():
            command = [sys.executable, str(WORKER), work, str(checkout), str(ckpt), str(folder / name)]
            processes[name] = subprocess.Popen(
                [*command, "--engine", config.engine, "--clock", config.clock],
                env=_environment(checkout),
                cwd=folder,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        yield {name: Worker(process) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def _edits(config: Against, checkouts: Mapping[str, Path], ckpt: Path, folder: Path) -> list[Figure]:
    exact = {"steps": config.steps, "guidance_scale": config.guidance}
    with _workers("edit", config, checkouts, ckpt, folder) as workers:
        for worker in workers.values():
            worker.seconds(json.dumps(exact))  # a warm-up, too
        old, new = (np.load(folder / name / "frames.npy")[0] for name in ("old", "new"))
        found = psnr(old, new)
        if found < SAME_DB:
            raise WrongFrames(f"the exact edits are {found:.1f} dB apart, {SAME_DB:g} dB at least would be rounding")
        seconds = {"old": list[float](), **{preset: list[float]() for preset in PRESETS}}
        for _ in range(config.pairs):
            seconds["old"].append(workers["old"].seconds(json.dumps(exact)))
            for preset, settings in PRESETS.items():
                seconds[preset].append(workers["new"].seconds(json.dumps(exact | settings)))
        peaks = {name: worker.peak_mib() for name, worker in workers.items()}
    figures = [Figure(name="exact edits alike", value=found, unit="dB", goal=f"≥ {SAME_DB:g} dB", met=True)]
    figures += [_times(f"edit, {preset}", seconds["old"], seconds[preset], GOALS[preset]) for preset in PRESETS]
    return [*figures, _memory("edit", peaks)]


def _tuning(config: Against, checkouts: Mapping[str, Path], ckpt: Path, folder: Path) -> list[Figure]:
    with _workers("tune", config, checkouts, ckpt, folder) as workers:
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(1 + config.tuning_steps):
            for name, worker in workers.items():
                found = worker.seconds("step")
                if number:  # the first warms up
                    seconds[name].append(found)
        peaks = {name: worker.peak_mib() for name, worker in workers.items()}
    times = _times("tuning step", seconds["old"], seconds["new"], GOALS["tuning step"])
    return [times, _memory("tuning", peaks)]


def _times(name: str, old: list[float], new: list[float], goal: float) -> Figure:
    """Of what was done in turn."""
    low, median, high = np.percentile(np.divide(old, new), [10, 50, 90])
    spread = f"{low:.2f}…{high:.2f} × (p10…p90; {np.median(old):.3g} and {np.median(new):.3g} s)"
    return Figure(name=name, value=float(median), unit=f"× as fast, {spread}", goal=f"≥ {goal:g} ×", met=median >= goal)


def _memory(name: str, peaks: Mapping[str, float]) -> Figure:
    share = peaks["new"] / peaks["old"]
    unit = f"× the old one's {peaks['old']:.0f} MiB"
    return Figure(name=f"peak of memory, {name}", value=share, unit=unit, goal="≤ 1.0 ×", met=share <= 1.005)


if __name__ == "__main__":
    sys.exit(
        command.run(
            "benchmarks/against.py",
            lambda arguments: main(tyro.cli(Against, prog="benchmarks/against.py", args=arguments)),
        )
    )
