"""What a suite's driver itself takes for many clips: planning, and handing units to workers that end them at once.

`python benchmarks/scheduler.py --clips 10000`
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from common import machine

from tav_opt import command
from tav_opt.config import ClipConfig, MetricsConfig
from tav_opt.suite.scheduling import Ended, run
from tav_opt.suite.suite_types import Method, Suite, SuiteEdit, SuiteVideo
from tav_opt.suite.unit_store import UnitStore
from tav_opt.suite.units import Place, Unit, model_of, units


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """Times the driver's own work."""

    clips: int = 10_000
    edits: int = 4
    workers: int = 64


@dataclass
class AtOnce:
    """A pool whose workers end every unit as soon as it is asked for."""

    workers: int
    running: deque[Unit] = field(default_factory=deque)
    model: str = ""

    def room(self) -> bool:
        return len(self.running) < self.workers

    def held(self) -> Collection[str]:
        return [self.model]

    def start(self, unit: Unit) -> None:
        self.running.append(unit)
        self.model = model_of(unit) or self.model

    def wait(self) -> Ended:
        return Ended(unit=self.running.popleft(), seconds=1.0)


def suite(config: Scheduler) -> Suite:
    """Clips that are nowhere."""
    edits = tuple(SuiteEdit(name=f"e{number}", prompt="a cat") for number in range(config.edits))
    videos = tuple(
        SuiteVideo(name=f"v{number}", clip=ClipConfig(video=Path(f"v{number}.mp4")), caption="a dog", edits=edits)
        for number in range(config.clips)
    )
    return Suite(
        file=Path("suite.yaml"), model="m", videos=videos, methods=(Method(name="ours"),), metrics=MetricsConfig()
    )


def main(config: Scheduler) -> int:
    print(machine())
    began = time.perf_counter()
    planned = units(suite(config), Place(device="cuda", dtype="float16"), hashed=False)
    planned_at = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(planned, UnitStore(Path(folder)), AtOnce(config.workers), config.workers, lambda *_: None)
    ended_at = time.perf_counter()
    assert not outcome.faults and len(outcome.units) == config.clips * (2 + 2 * config.edits)
    seconds = ended_at - planned_at
    print(f"{len(planned)} units planned in {planned_at - began:.1f} s, without hashes of files")
    print(f"handed out and taken back in {seconds:.1f} s, {len(planned) / seconds:.0f} a second")
    return 0


def started(arguments: Sequence[str]) -> int:
    return main(tyro.cli(Scheduler, prog="python benchmarks/scheduler.py", description=__doc__, args=arguments))


if __name__ == "__main__":
    sys.exit(command.run("python benchmarks/scheduler.py", started))
