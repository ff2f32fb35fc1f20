"""A suite evaluated, in this process or by workers of Ray, and its report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tav_opt import models
from tav_opt.base.directory import Base
from tav_opt.base.image_model import load_tokenizer
from tav_opt.config import InputError, PathLike
from tav_opt.device import dtype_on, usable_device
from tav_opt.files import check_place
from tav_opt.suite import planning, ray_workers, report_folder, results
from tav_opt.suite.scheduling import Ended, InProcess, OnEnd, Outcome, Pool, Progress, run
from tav_opt.suite.suite_types import Suite
from tav_opt.suite.tgve import write_result
from tav_opt.suite.unit_store import UnitStore
from tav_opt.suite.units import Place, Unit, measured_by, missing_files, pinned, units
from tav_opt.suite.workshop import Workshop
from tav_opt.video import read


@dataclass(frozen=True, kw_only=True)
class Where:
    """What does the units."""

    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU where there is one."""
    dtype: str = "auto"
    """float32, float16, bfloat16, or by the device."""
    workers: int | None = None
    """Processes by Ray; None: this process alone, or as many as a cluster has room for."""
    ray: str | None = None
    """Address of a Ray cluster."""

    def place(self) -> Place:
        """In this process."""
        import torch

        device = usable_device(self.device)
        dtype = dtype_on(device, getattr(torch, self.dtype, None))
        return Place(device=str(device), dtype=str(dtype).removeprefix("torch."))


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Who is told how far an evaluation is."""

    on_step: Callable[[Unit, str, int, int], object] = lambda *_: None
    on_end: OnEnd = lambda *_: None


@contextmanager
def shown() -> Iterator[Shown]:
    """Tells it on stderr: a line for each unit that ends, and on a terminal the step of the present one."""
    terminal = sys.stderr.isatty()

    def step(unit: Unit, stage: str, done: int, steps: int) -> None:
        if terminal:
            print(f"\r\033[K{unit.kind} {unit.name}: {stage} {done} of {steps}", end="", file=sys.stderr, flush=True)

    def end(ended: Ended, progress: Progress) -> None:
        left = progress.seconds_left()
        text = (
            f"[{progress.total - sum(progress.left.values())}/{progress.total}] {ended.unit.kind} {ended.unit.name}: "
        )
        text += f"{ended.seconds:.1f} s" if ended.fault is None else f"FAILED: {ended.fault}"
        text += "" if left is None else f"; about {_told(left)} left"
        print(("\r\033[K" if terminal else "") + text, file=sys.stderr, flush=True)

    yield Shown(on_step=step, on_end=end)


def _told(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def check(suite: Suite) -> None:
    """Raises InputError before anything long begins: what is not there, is too long to be read, or of a wrong size."""
    if gone := missing_files(suite):
        more = f", and {len(gone) - 5} more" if len(gone) > 5 else ""
        raise InputError(f"{suite.file}: these do not exist: {'; '.join(gone[:5])}{more}")
    if all(method.kind == "folder" for method in suite.methods):
        return
    base = Base.at(suite.model)
    tokenizer = load_tokenizer(base)
    negative = [(method.name, method.edit.negative_prompt) for method in suite.methods if method.kind != "folder"]
    own = [(video.name, text) for video in suite.videos for text in (video.caption, *(e.prompt for e in video.edits))]
    for name, text in (*negative, *own):
        try:
            models.tokenize(tokenizer, text or "")
        except InputError as error:
            raise InputError(f"{suite.file}: {name}: {text!r}: {error}") from None
    for video in suite.videos:
        try:
            models.check_size(video.clip.height, video.clip.width, base.vae_factor)
        except InputError as error:
            raise InputError(f"{suite.file}: {video.name}: {error}") from None


def evaluate(
    suite: Suite, out: PathLike, where: Where, show: Shown, *, tgve: Path | None = None, only_report: bool = False
) -> Outcome:
    """Does all of a suite that is not done yet, unless `only_report`, and writes the report of all that is.

    `tgve` is a folder for the edits of a suite of TGVE's manifest in its own layout, `METHOD/SOURCE_480p/…`. Raises
    InputError where something is not there, before anything long begins, and when the disk is full.
    """
    store = UnitStore.at(out)
    if not only_report:
        store.check()
    check(suite)
    metrics = pinned(suite.metrics)
    suite = replace(suite, metrics=metrics, measured_by=measured_by(metrics))
    if tgve is not None:
        if not all(video.source for video in suite.videos):
            raise InputError(f"{suite.file} has no manifest of TGVE, whose layout {tgve} would have")
        for method in suite.methods:
            check_place(tgve / method.name / "results")
    if only_report:
        outcome = Outcome(_planned(suite, where), {}, [])
    else:
        outcome = do(suite, out, where, show, lambda place: units(suite, place))
    found = results.rows(suite, outcome.units, store)
    if only_report and not found:
        raise InputError(f"{out} has no edit of {suite.file} that is measured: there is nothing to report yet")
    page = report_folder.write(suite, found, outcome.faults, outcome.kept_back, store.root / "report")
    if store.there is not None:
        store.there.put(page.parent, page.parent.name, page.name)
        outcome = replace(outcome, report_url=f"{store.there.url}/{page.parent.name}/{page.name}")
    if tgve is not None:
        _write_tgve(suite, found, tgve)
    return replace(outcome, report=page)


def _planned(suite: Suite, where: Where) -> list[Unit]:
    """As `do` plans them, on what units would run."""
    if where.ray is None:
        return units(suite, where.place())
    with ray_workers.connected(where.ray, 1) as ray:
        return units(suite, ray_workers.place_on(ray, where.device, where.dtype))


def do(suite: Suite, out: PathLike, where: Where, show: Shown, planned: Callable[[Place], list[Unit]]) -> Outcome:
    """Does units, in this process or by workers: the same code, and the same results."""
    store = UnitStore.at(out)
    with store.claimed():
        if where.workers is None and where.ray is None:
            place = where.place()
            return run(planned(place), store, InProcess(Workshop(suite, place, store), show.on_step), 1, show.on_end)
        if store.there is not None and store.there.is_this_process:
            raise InputError(f"{out} is seen by this process alone, not by workers: give a folder or another URL")
        with ray_workers.connected(where.ray, where.workers or 1) as ray:
            place = where.place() if where.ray is None else ray_workers.place_on(ray, where.device, where.dtype)
            found = planned(place)
            pool, workers = _pool(ray, suite, store, where, place, planning.plan_of(suite, found, place).gib)
            return run(found, store, pool, workers, show.on_end)


def _pool(
    ray: ray_workers.Ray, suite: Suite, store: UnitStore, where: Where, place: Place, gib: float
) -> tuple[Pool, int]:
    if where.ray is None and place.device == "cpu":
        assert where.workers is not None
        ray_workers.check_memory(where.workers, gib)
        workers, taken = where.workers, {"num_cpus": 1.0}
    else:
        taken = ray_workers.resources(ray, place, gib)
        workers = ray_workers.fitting(where.workers, taken, ray.cluster_resources())
    out = str(store.root.absolute()) if store.there is None else store.there.url
    return ray_workers.RayPool(ray, suite, place, out, workers, taken), workers


def _write_tgve(suite: Suite, found: list[results.Row], folder: Path) -> None:
    sources = {video.name: video.source for video in suite.videos}
    for row in found:
        frames = read(row.file).frames
        write_result(folder / row.method, sources[row.video], row.video, row.edit, frames)
