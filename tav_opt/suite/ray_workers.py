"""The same units as tasks of Ray, on one machine or a cluster: workers that keep their models, and may die."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

import torch

from tav_opt.command import MAX_LINE
from tav_opt.config import InputError
from tav_opt.device import dtype_on
from tav_opt.memory.free import free_bytes
from tav_opt.suite.scheduling import Ended, attempt
from tav_opt.suite.suite_types import Suite
from tav_opt.suite.unit_store import UnitStore
from tav_opt.suite.units import Place, Unit, model_of
from tav_opt.suite.workshop import Workshop

Ray = Any
"""The module: an extra, not installed everywhere."""
CONNECT_SECONDS = 10
TRIES = 3
"""Of a unit whose worker died, as of a lost node or of the system's hand when memory is short."""


class Worker:
    """An actor: one workshop, in a process of its own."""

    def __init__(self, suite: Suite, place: Place, out: str, threads: int) -> None:
        torch.set_num_threads(threads)
        store = UnitStore.at(out)
        if store.there is None and not store.root.is_dir():
            raise InputError(
                f"{out} is not seen from {os.uname().nodename}: give a folder that all nodes share, or a URL"
            )
        self._workshop = Workshop(suite, place, store)

    def ready(self) -> None:
        """Answers as soon as the worker lives."""

    def do(self, unit: Unit) -> Ended:
        """Does a unit; what is wrong with it comes back as one line."""
        return attempt(self._workshop, unit, lambda *_: None)


class RayPool:
    """Workers of Ray; see `scheduling.Pool`.

    Only a worker that lives is given a unit: one that a cluster has no room for, as after a node was lost, waits for
    its place, and its unit does not wait with it.
    """

    def __init__(self, ray: Ray, suite: Suite, place: Place, out: str, workers: int, resources: Mapping[str, float]):
        threads = max(1, (os.cpu_count() or 1) // workers) if place.device == "cpu" else 1
        self._ray = ray
        self._make = lambda: (
            ray.remote(Worker)
            .options(**resources, max_restarts=0, max_task_retries=0)
            .remote(suite, place, out, threads)
        )
        self._coming: dict[Any, tuple[Any, str]] = {}
        self._idle: list[tuple[Any, str]] = []
        self._busy: dict[Any, tuple[Any, Unit, str]] = {}
        self._again: list[Unit] = []
        """Units whose worker died."""
        self._tries: Counter[str] = Counter()
        self._not_started = 0
        """Workers in a row that never lived."""
        for _ in range(workers):
            self._add()

    def _add(self) -> None:
        self._ask(self._make(), "")

    def _ask(self, worker: Any, held: str) -> None:
        """Whether a worker lives."""
        self._coming[worker.ready.remote()] = worker, held

    def room(self) -> bool:
        return len(self._idle) > len(self._again)

    def held(self) -> Collection[str]:
        return {held for _, held in self._idle}

    def start(self, unit: Unit) -> None:
        """On a worker that has the model in hand, where one is idle."""
        wanted = model_of(unit)
        worker, held = self._idle.pop(next((n for n, (_, held) in enumerate(self._idle) if held == wanted), 0))
        self._busy[worker.do.remote(unit)] = worker, unit, wanted or held

    def wait(self) -> Ended | None:
        while self._again and self._idle:
            self.start(self._again.pop(0))
        (ready, *_), _ = self._ray.wait([*self._busy, *self._coming], num_returns=1)
        if ready in self._coming:
            self._came(ready)
            return None
        worker, unit, held = self._busy.pop(ready)
        try:
            ended: Ended = self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            self._add()
            idle, self._idle = self._idle, []
            for others in idle:  # they may have been on the same node
                self._ask(*others)
            return self._lost(unit, _reason(error))
        self._idle.append((worker, held))
        return ended

    def _came(self, ready: Any) -> None:
        """Raises InputError where no worker can work, as where none sees the folder of results."""
        worker, held = self._coming.pop(ready)
        try:
            self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            self._not_started += 1
            if self._not_started < TRIES:
                self._add()
            elif not (self._coming or self._busy or self._idle):
                raise InputError(f"no worker can be started: {_reason(error)}") from None
            return
        self._not_started = 0
        self._idle.append((worker, held))

    def _lost(self, unit: Unit, reason: str) -> Ended | None:
        self._tries[unit.id] += 1
        if self._tries[unit.id] < TRIES:
            self._again.append(unit)
            return None
        return Ended(unit=unit, seconds=0.0, fault=f"its worker died {TRIES} times: {reason}"[:MAX_LINE])


def _reason(error: Exception) -> str:
    """Ray's errors have many lines, of which the last says what it was."""
    return str(error).strip().splitlines()[-1].strip()


@contextmanager
def connected(address: str | None, workers: int) -> Iterator[Ray]:
    """Ray, started on this machine for so many workers, or a cluster's; raises InputError where it cannot be had."""
    try:
        ray = import_module("ray")
    except ModuleNotFoundError:
        raise InputError("workers need Ray, which is not installed: pip install 'tav-opt[ray]'") from None
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    if address is not None:
        _check_answers(address)
    try:
        if address is None:
            ray.init(num_cpus=workers, **quiet)
        else:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray answers at {address}: {str(error).strip().splitlines()[0]}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises InputError where nothing listens at HOST:PORT: Ray itself would try for minutes."""
    parts = urlsplit(address if "//" in address else f"//{address}")
    try:
        if parts.hostname is not None and parts.port is not None:
            socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise InputError(f"no Ray answers at {address}: {getattr(error, 'strerror', None) or error}") from None


def place_on(ray: Ray, device: str, dtype: str) -> Place:
    """Where units run on a cluster: on its GPUs where it has any, unless told otherwise."""
    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
    chosen = dtype_on(torch.device(device), getattr(torch, dtype, None))
    return Place(device=device, dtype=str(chosen).removeprefix("torch."))


def resources(ray: Ray, place: Place, gib: float) -> dict[str, float]:
    """What one worker takes of a cluster: a processor, memory by our estimate, and its share of a GPU."""
    needed = int(gib * 2**30)
    if torch.device(place.device).type != "cuda":
        return {"num_cpus": 1, "memory": needed}
    bytes_of = ray.remote(lambda: torch.cuda.mem_get_info()[1])
    return {"num_cpus": 1, "num_gpus": gpu_share(needed, ray.get(bytes_of.options(num_gpus=1).remote()))}


def gpu_share(needed: int, memory: int) -> float:
    """The part of a GPU that a worker takes, one of so many as fit; raises InputError where none does."""
    if needed > memory:
        raise InputError(f"a worker needs {needed / 2**30:.1f} GiB, a GPU here has {memory / 2**30:.1f} GiB")
    return 1 / (memory // needed)


def fitting(workers: int | None, taken: Mapping[str, float], offered: Mapping[str, float]) -> int:
    """How many workers a cluster has room for, or those that are asked for, which must fit."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    most = min(int(offered.get(names[name], 0) / amount + 1e-9) for name, amount in taken.items() if amount)
    if not most or (workers or 0) > most:
        told = ", ".join(f"{amount:g} {names[name]}" for name, amount in taken.items())
        raise InputError(f"{workers or 1} workers do not fit: each takes {told}, there is room for {most}")
    return workers or most


def check_memory(workers: int, gib: float) -> None:
    """Raises InputError where so many workers would take more memory than this machine has free."""
    free = free_bytes(torch.device("cpu")) / 2**30
    if workers * gib > free:
        raise InputError(f"{workers} workers need about {workers * gib:.1f} GiB, this machine has {free:.1f}: fewer")
