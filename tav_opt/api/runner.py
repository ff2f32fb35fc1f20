"""What works on the jobs: takes them, asks the server, keeps what it made; and goes on where a process ended."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from tav_opt.api.api_config import ApiConfig
from tav_opt.api.asked_fields import SOURCE, files, frames
from tav_opt.api.bodies import SENT
from tav_opt.api.fitting import fitted
from tav_opt.api.job_files import JobFiles
from tav_opt.api.jobs import RUNS, ErrorCode, Job, Jobs
from tav_opt.api.orders import Order, expected_steps, order_of
from tav_opt.client import AsyncClient, Edit, ServerError
from tav_opt.client.channel import Unreachable
from tav_opt.client.exchange import WORKER_GONE
from tav_opt.client.sources import in_place
from tav_opt.config import InputError
from tav_opt.contract import ServedClip
from tav_opt.files import DiskFull

T = TypeVar("T")
SWEEP_SECONDS = 30.0
"""How often it is looked for what has expired."""
FIRST_REST, LONGEST_REST = 0.5, 15.0
"""Seconds of rest, doubled each time, while the server takes nothing."""
_WHOLE = 100
"""Per cent; told once the video is on the disk."""


class Unreached(Exception):
    """The server did not begin the edit, through no fault of it."""


class Lost(Exception):
    """The server ended amid the edit."""


@dataclass(kw_only=True)
class _Share:
    """How much of an edit is done: the inversion, where it has one, and the sampling."""

    sampling: int = 0
    """Steps of it that are expected."""
    inverted: int = 0
    percent: int = 0

    def step(self, stage: str, step: int, steps: int) -> None:
        if stage == "invert":
            self.inverted = steps
            done, all_ = step, steps + self.sampling
        else:
            done, all_ = self.inverted + step, self.inverted + steps
        self.percent = max(self.percent, min(_WHOLE - 1, _WHOLE * done // max(1, all_)))


class Runner:
    """Of one event loop; `run` until it is cancelled."""

    def __init__(self, config: ApiConfig, jobs: Jobs, kept: JobFiles, client: AsyncClient) -> None:
        self._config, self._jobs, self._files, self._client = config, jobs, kept, client
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._shares: dict[str, _Share] = {}
        self._woken = asyncio.Event()
        self._changed = asyncio.Event()
        self._rest = 0.0
        self._keep_seconds = config.keep_hours * 3600

    # What others ask of it.

    def percent(self, job: Job) -> int:
        """How much of a job is done."""
        if job.status == "completed":
            return _WHOLE
        return self._shares[job.id].percent if job.id in self._shares else 0

    def wake(self) -> None:
        """There is a new job."""
        self._tell()

    async def changed(self, seconds: float) -> None:
        """Waits until something is new of some job, or so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    async def remove(self, job: Job) -> None:
        """A job is wanted no more: it is cancelled on the server, and its files go."""
        self._jobs.remove(job.id)
        if (task := self._tasks.get(job.id)) is not None:
            task.cancel()
            await asyncio.wait([task])
            self._end(job.id)  # of a task that was not yet begun nobody else does it
        await asyncio.to_thread(self._files.remove, job.id)
        self._tell()

    def make_room(self, needed: int) -> bool:
        """Removes what was finished longest ago until there is room for so many bytes; False where there is none."""
        limit = self._config.keep_mib << 20
        while self._jobs.bytes() + needed > limit:
            oldest = self._jobs.oldest_finished()
            if oldest is None:
                return False
            self._forget(oldest)
        return True

    # The work.

    def recover(self) -> None:
        """After a start: what is whole on the disk is done, what was in work waits for its other run or has failed."""
        self._files.sweep(self._jobs.ids())
        for job in self._jobs.unfinished():
            if (outcome := self._files.stored(job.id)) is not None:
                self._jobs.complete(job.id, outcome, self._keep_seconds)
            elif job.status == "in_progress":
                self._run_again(job, "the API ended while it made this video")

    async def run(self) -> None:
        """Works on the jobs until it is cancelled; what is in work then waits as if it had not been begun."""
        sweeping = asyncio.create_task(self._sweep())
        try:
            while True:
                self._woken.clear()
                if self._rest:
                    await asyncio.sleep(self._rest)
                while len(self._tasks) < (1 if self._rest else self._config.parallel) and (job := self._jobs.take()):
                    self._begin(job)
                await self._woken.wait()
        finally:
            sweeping.cancel()
            under_way = dict(self._tasks)
            for task in under_way.values():
                task.cancel()
            if under_way:
                await asyncio.wait(under_way.values())
            for job_id in under_way:
                self._jobs.give_back(job_id)

    def _begin(self, job: Job) -> None:
        self._shares[job.id] = _Share()
        self._tasks[job.id] = asyncio.create_task(self._work(job))
        self._tell()

    def _end(self, job_id: str) -> None:
        self._tasks.pop(job_id, None)
        self._shares.pop(job_id, None)
        self._tell()

    async def _work(self, job: Job) -> None:
        """Nothing is awaited between what the table says of the end and the end: the next run may begin at once."""
        try:
            edit = await self._edit(job)
            outcome = await _to_its_end(asyncio.to_thread(self._files.store, job.id, edit, job.prompt))
            self._jobs.complete(job.id, outcome, self._keep_seconds)
            self.make_room(0)
        except Unreached as why:
            self._wait(job, str(why))
        except Lost as why:
            self._run_again(job, str(why))
        except DiskFull as error:
            self._fail(job, "server_error", f"the API's disk is full: {error}")
        except InputError as error:
            self._fail(job, "invalid_request", str(error))
        except ServerError as error:
            self._fail(job, "server_error", str(error))
        except Exception as error:
            self._fail(job, "server_error", f"{type(error).__name__}: {error}".splitlines()[0][:500])
        finally:
            self._end(job.id)

    async def _edit(self, job: Job) -> Edit:
        """Asks the server; raises InputError and ServerError for what it says, Unreached and Lost."""
        began = False
        try:
            clip = await self._client.clip(job.model.partition("@")[0])
            order = order_of(job.asked, clip)
            self._shares[job.id].sampling = expected_steps(order)
            options = await self._with_files(job, order, clip)
            async with self._client.stream(order.clip, order.edit, **options) as stream:
                async for progress in stream:
                    began, self._rest = True, 0.0
                    self._shares[job.id].step(progress.stage, progress.step, progress.steps)
                    self._tell()
                return await stream.result()
        except Unreachable as error:
            raise (Lost if began else Unreached)(str(error)) from None
        except ServerError as error:
            if not began and error.status == "UNAVAILABLE":
                raise Unreached(str(error)) from None
            if error.status in ("UNAVAILABLE", "UNKNOWN", "CANCELLED") or _ended_amid(error):
                raise Lost(str(error)) from None
            raise

    async def _with_files(self, job: Job, order: Order, clip: ServedClip) -> Any:
        """The options of the edit, with the files that were sent."""
        options: dict[str, Any] = dict(order.options)
        seconds = self._config.decode_seconds
        for name in sorted(files()):
            if job.asked.get(name) == SENT:
                path = self._files.upload(job.id, name)
                if name in frames():
                    options[name] = (await fitted(path, clip, order.choice, name=name, seconds=seconds)).frames
                else:
                    options[name] = await asyncio.to_thread(path.read_bytes)
        for name in (SOURCE, "video"):
            if job.asked.get(name):
                choice = order.choice if job.asked[name] == SENT else {}  # a video made here comes as it is
                path = self._files.upload(job.id, name)
                source = await fitted(path, clip, choice, name=name, seconds=seconds)
                return in_place(options, source, clip)  # type: ignore[arg-type]
        return options

    def _wait(self, job: Job, why: str) -> None:
        if self._is_late(job, time.time()):
            return
        self._jobs.give_back(job.id)
        self._rest = min(2 * self._rest or FIRST_REST, LONGEST_REST)
        _say(f"{why}; {job.id} waits, again in {self._rest:g} s")

    def _is_late(self, job: Job, now: float) -> bool:
        """Whether a job that no server took has waited for too long; it has then failed."""
        if job.created_at + self._keep_seconds > now:
            return False
        self._fail(job, "expired", f"no server took it within {self._config.keep_hours:g} hours")
        return True

    def _run_again(self, job: Job, why: str) -> None:
        if job.runs < RUNS:
            self._jobs.again(job.id)
            _say(f"{why}; {job.id} is run again")
        else:
            self._fail(job, "server_error", f"{why}; it was run {RUNS} times")

    def _fail(self, job: Job, code: ErrorCode, message: str) -> None:
        if self._jobs.fail(job.id, code, message, self._keep_seconds):
            self._files.remove(job.id)

    async def _sweep(self) -> None:
        while True:
            now = time.time()
            for job in self._jobs.expired(now):
                self._forget(job)
            for job in self._jobs.unfinished():
                if job.status == "queued":
                    self._is_late(job, now)
            await asyncio.sleep(SWEEP_SECONDS)

    def _forget(self, job: Job) -> None:
        self._jobs.remove(job.id)
        self._files.remove(job.id)

    def _tell(self) -> None:
        self._woken.set()
        before, self._changed = self._changed, asyncio.Event()
        before.set()


def _ended_amid(error: ServerError) -> bool:
    return error.status == "INTERNAL" and (WORKER_GONE in error.details or "without a result" in error.details)


async def _to_its_end(work: Awaitable[T]) -> T:
    """Whatever is cancelled meanwhile: a thread cannot be."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _say(text: str) -> None:
    print(f"tav-opt api: {text}", file=sys.stderr, flush=True)
