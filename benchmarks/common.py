"""What every benchmark shares: the header that says where it ran, the timer, the table, the JSON beside it."""

from __future__ import annotations

import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tav_opt.files import write_json

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one stage over several calls."""

    stage: str
    median: float
    p10: float
    p90: float
    calls: int


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number beside its goal."""

    name: str
    value: float
    unit: str
    goal: str
    met: bool

    def __str__(self) -> str:
        return f"| {self.name} | {self.value:.3g} {self.unit} | {self.goal} | {'yes' if self.met else 'no'} |"


def timed(stage: str, call: Callable[[], Any], *, calls: int = 10, warmup: int = 1) -> Timing:
    """Median, p10 and p90 of `calls` calls after `warmup` ones that do not count; waits for a GPU to finish."""
    return in_turn(stage, {"": call}, calls=calls, warmup=warmup)[""]


def in_turn(
    stage: str,
    runs: Mapping[str, Callable[[], Any]],
    *,
    calls: int = 10,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """As `timed`, of several that take turns, so that what else the machine does meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + calls):
        for name, call in runs.items():
            start = clock()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup:
                seconds[name].append(clock() - start)
    found = {}
    for name, times in seconds.items():
        p10, median, p90 = np.percentile(times, [10, 50, 90])
        found[name] = Timing(stage, float(median), float(p10), float(p90), calls)
    return found


def apart(function: Callable[[], Any]) -> Any:
    """What a function returns, called in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def peak_of(call: Callable[[], T]) -> tuple[float, T]:
    """The most memory in MiB that the process has while it is called, and what that returns; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    found = call()
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) / 1024, found


def machine() -> dict[str, str]:
    """Processor, accelerator and the versions that matter."""
    cpu = next(
        (x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.machine()
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {name: _version(name) for name in ("torch", "diffusers", "onnxruntime", "triton", "numpy")}
    threads = str(torch.get_num_threads())
    return {"cpu": cpu, "threads": threads, "gpu": gpu, "python": platform.python_version(), **versions}


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def table(title: str, timings: Sequence[Timing]) -> str:
    """A Markdown table in milliseconds."""
    rows = [f"### {title}", "", "| stage | median ms | p10 | p90 | calls |", "|---|---:|---:|---:|---:|"]
    rows += [
        f"| {t.stage} | {t.median * 1e3:.1f} | {t.p10 * 1e3:.1f} | {t.p90 * 1e3:.1f} | {t.calls} |" for t in timings
    ]
    return "\n".join(rows)


def header(what: str) -> str:
    """What ran where, for the top of a table."""
    return f"{what}\n" + ", ".join(f"{key} {value}" for key, value in machine().items())


def save(path: Path, what: dict[str, Any], results: dict[str, Sequence[Timing]], quality: dict[str, Any]) -> None:
    """The figures as JSON: what was asked for, the machine, the parity found first, and the timings in seconds."""
    timings = {engine: [asdict(t) for t in found] for engine, found in results.items()}
    content = {"what": what, "machine": machine(), "quality": quality, "seconds": timings}
    write_json(path, content)
