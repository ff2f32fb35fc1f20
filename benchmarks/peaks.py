"""Memory at its peak beside what was estimated before: `python benchmarks/peaks.py`, one process a case."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from common import apart, header, machine
from presets import prepare

from tav_opt import command, editing, tuning
from tav_opt.checkpoint import load
from tav_opt.config import EditConfig, TrainConfig
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.files import write_json
from tav_opt.memory import eager
from tav_opt.video import Clip


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is done, to how much."""

    preset: str
    action: Literal["tune", "tune, gradient checkpointing", "edit"]
    frames: int
    size: int


CASES = (
    Case(preset="demo", action="tune", frames=24, size=64),
    Case(preset="demo", action="edit", frames=24, size=64),
    Case(preset="sd15", action="tune", frames=4, size=256),
    Case(preset="sd15", action="tune, gradient checkpointing", frames=4, size=256),
    Case(preset="sd15", action="edit", frames=8, size=256),
)


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Tune and edit, each in a process of its own, and print the peak of its resident memory beside the estimate."""

    presets: tuple[str, ...] = ("demo", "sd15")
    out: Path = Path("benchmarks/results/peaks.json")


def main(config: Peaks) -> int:
    """Runs the cases one after the other and writes the table."""
    rows = []
    for case in (case for case in CASES if case.preset in config.presets):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            ckpt = apart(partial(prepare, case.preset, folder, frames=case.frames, size=case.size, steps=2))
            estimated, peak = apart(partial(measure, case, ckpt, folder / "tuned"))
        rows.append({**asdict(case), "estimated": estimated, "peak": peak})
    print(header("peak of resident memory"))
    print("\n| model | what | frames | size | estimated GiB | measured GiB |\n|---|---|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['preset']} | {row['action']} | {row['frames']} | {row['size']}² "
            f"| {row['estimated'] / 2**30:.2f} | {row['peak'] / 2**30:.2f} |"
        )
    content = {"command": " ".join(sys.argv), "machine": machine(), "bytes": rows}
    write_json(config.out, content)
    return 0


def measure(case: Case, ckpt: Path, out: Path) -> tuple[int, int]:
    """Bytes that were estimated, and the peak reached after that, above what Python and the libraries take."""
    before = _resident("VmRSS")
    estimated = _edit(ckpt) if case.action == "edit" else _tune(case, load(ckpt).info.base, out)
    return estimated, _resident("VmHWM") - before


def _edit(ckpt: Path) -> int:
    estimates = _noted("check_editing", eager.estimate_editing)
    editing.edit(open_checkpoint(ckpt), EditConfig(prompts=("a red thing",), steps=2, guidance_scale=7.5))
    return estimates[0]


def _tune(case: Case, base: str, out: Path) -> int:
    estimates = _noted("fit_tuning", eager.estimate_tuning)
    pixels = np.random.default_rng(0).integers(0, 256, (case.frames, case.size, case.size, 3), dtype=np.uint8)
    config = TrainConfig(steps=2, inversion_steps=2, gradient_checkpointing="checkpointing" in case.action)
    tuning.tune(base, Clip(frames=pixels, fps=8.0), "a red thing", config, out)
    return estimates[0]


def _noted(check: str, estimate: Callable[..., int]) -> list[int]:
    """Where the estimate will be when `memory`'s check of it was made; the peak counts from there.

    The one before is of loading, when a model's file is mapped beside the copy of it: pages that the kernel can drop.
    """
    estimates: list[int] = []
    checked = getattr(eager, check)

    def noted(*arguments: object) -> object:
        found = checked(*arguments)
        estimates.append(estimate(*arguments))
        Path("/proc/self/clear_refs").write_text("5")
        return found

    setattr(eager, check, noted)
    return estimates


def _resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "Linux only"
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(command.run("peaks", lambda arguments: main(tyro.cli(Peaks, args=arguments))))
