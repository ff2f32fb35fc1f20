"""The jobs, in SQLite: what is committed there survives the process, and is what clients are told."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tav_opt.config import InputError

Status = Literal["queued", "in_progress", "completed", "failed"]
"""As OpenAI names them."""
ErrorCode = Literal["invalid_request", "server_error", "expired"]
Order = Literal["asc", "desc"]

RUNS = 2
"""How often a job is begun at most: what ended amid its run is run again, once."""
MAX_FINISHED = 10_000
"""Finished jobs that are remembered."""
_VERSION = 1
_TABLE = """
create table if not exists jobs (
    number integer primary key autoincrement,
    id text not null unique, owner text not null, status text not null, model text not null, prompt text not null,
    asked text not null, seconds text not null, size text not null, remixed_from text, bytes integer not null,
    created_at real not null, runs integer not null default 0, completed_at real, expires_at real,
    error_code text, error_message text, settings text
);
create index if not exists of_owner on jobs (owner, status);
create index if not exists of_status on jobs (status, number);
"""


class QueueFull(Exception):
    """The owner has as many jobs waiting or in work as one may have."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A video that was asked for."""

    id: str
    owner: str
    model: str
    """As it was asked for: the clip, and maybe a preset."""
    prompt: str
    asked: Mapping[str, Any]
    """What else was asked for; `orders` makes an edit of it."""
    seconds: str
    size: str
    remixed_from: str | None = None
    bytes: int = 0
    """That its files take."""
    status: Status = "queued"
    created_at: float = field(default_factory=time.time)
    number: int = 0
    """In the order of their coming."""
    runs: int = 0
    """How often it was begun."""
    completed_at: float | None = None
    expires_at: float | None = None
    error_code: ErrorCode | None = None
    error_message: str | None = None
    settings: Mapping[str, Any] | None = None
    """What the server says that it was made with."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is known of a video once it is made."""

    seconds: str
    size: str
    settings: Mapping[str, Any]
    bytes: int


class Jobs:
    """The table; every method is one transaction, on the disk when it returns."""

    def __init__(self, path: Path) -> None:
        """Opens it, or makes it; raises InputError for a file that is none of ours."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("pragma journal_mode = wal")
            self._db.execute("pragma synchronous = full")
            found = self._db.execute("pragma user_version").fetchone()[0]
            if found not in (0, _VERSION):
                raise InputError(f"{path} is of version {found}, not {_VERSION}: choose another folder")
            self._db.executescript(_TABLE)
            self._db.execute(f"pragma user_version = {_VERSION}")
        except sqlite3.Error as error:
            raise InputError(f"{path} cannot be used: {error}") from None

    def close(self) -> None:
        self._db.close()

    def add(self, job: Job, queue: int) -> None:
        """A new job; raises QueueFull where its owner has `queue` of them unfinished."""
        with self._transaction() as db:
            if self.unfinished_of(job.owner) >= queue:
                raise QueueFull
            names = "id owner status model prompt seconds size remixed_from bytes created_at".split()
            values = [getattr(job, name) for name in names] + [json.dumps(job.asked)]
            marks = ", ".join("?" * len(values))
            db.execute(f"insert into jobs ({', '.join(names)}, asked) values ({marks})", values)  # nosec B608  # names

    def unfinished_of(self, owner: str) -> int:
        """How many jobs an owner has waiting or in work."""
        asked = "select count(*) from jobs where owner = ? and status in ('queued', 'in_progress')"
        return int(self._db.execute(asked, [owner]).fetchone()[0])

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """A job; None where there is none, or it is another owner's."""
        found = self._read("where id = ? and (? is null or owner = ?)", job_id, owner, owner)
        return found[0] if found else None

    def page(self, owner: str, *, after: Job | None, limit: int, order: Order) -> list[Job]:
        """An owner's jobs in the order of their coming, or the newest first."""
        sign, start = (">", 0) if order == "asc" else ("<", 2**62)
        return self._read(
            f"where owner = ? and number {sign} ? order by number {order} limit ?",
            owner,
            after.number if after else start,
            limit,
        )

    def position(self, job: Job) -> int:
        """How many of the waiting came before it."""
        asked = "select count(*) from jobs where status = 'queued' and number < ?"
        return int(self._db.execute(asked, [job.number]).fetchone()[0])

    def take(self) -> Job | None:
        """Begins the next job: of the owner who has the fewest in work, the one that came first."""
        with self._transaction() as db:
            row = db.execute(
                "select id from jobs as one where status = 'queued' order by (select count(*) from jobs as other "
                "where other.status = 'in_progress' and other.owner = one.owner), number limit 1"
            ).fetchone()
            if row is None:
                return None
            db.execute("update jobs set status = 'in_progress', runs = runs + 1 where id = ?", [row["id"]])
        return self.get(row["id"])

    def give_back(self, job_id: str) -> None:
        """It waits as if it had never been begun."""
        self._change("status = 'queued', runs = runs - 1", job_id)

    def again(self, job_id: str) -> None:
        """It waits for its other run."""
        self._change("status = 'queued'", job_id)

    def complete(self, job_id: str, outcome: Outcome, keep_seconds: float) -> bool:
        """It is done; False where it was removed meanwhile."""
        now = time.time()
        return self._change(
            "status = 'completed', completed_at = ?, expires_at = ?, seconds = ?, size = ?, settings = ?, bytes = ?",
            job_id,
            *(now, now + keep_seconds, outcome.seconds, outcome.size, json.dumps(outcome.settings), outcome.bytes),
        )

    def fail(self, job_id: str, code: ErrorCode, message: str, keep_seconds: float) -> bool:
        """It will never be done; False where it was removed meanwhile."""
        now = time.time()
        return self._change(
            "status = 'failed', completed_at = ?, expires_at = ?, error_code = ?, error_message = ?, bytes = 0",
            job_id,
            *(now, now + keep_seconds, code, message),
        )

    def remove(self, job_id: str) -> None:
        self._db.execute("delete from jobs where id = ?", [job_id])

    def ids(self) -> set[str]:
        """Of all jobs."""
        return {row["id"] for row in self._db.execute("select id from jobs")}

    def unfinished(self) -> list[Job]:
        return self._read("where status in ('queued', 'in_progress') order by number")

    def expired(self, now: float) -> list[Job]:
        """Finished jobs whose time is over, and those that came before the last MAX_FINISHED."""
        finished = "select id from jobs where completed_at is not null order by completed_at desc"
        return self._read(f"where expires_at <= ? or id in ({finished} limit -1 offset ?)", now, MAX_FINISHED)

    def oldest_finished(self) -> Job | None:
        """That has files."""
        found = self._read("where completed_at is not null and bytes > 0 order by completed_at limit 1")
        return found[0] if found else None

    def bytes(self) -> int:
        """That all files take."""
        return int(self._db.execute("select coalesce(sum(bytes), 0) from jobs").fetchone()[0])

    def _change(self, what: str, job_id: str, *values: Any) -> bool:
        """Of a job that is not finished: what is reported done stays so."""
        where = "where id = ? and status in ('queued', 'in_progress')"
        return self._db.execute(f"update jobs set {what} {where}", [*values, job_id]).rowcount == 1  # nosec B608

    def _read(self, where: str, *values: Any) -> list[Job]:
        rows = self._db.execute(f"select * from jobs {where}", values).fetchall()  # nosec B608  # ours
        return [_job(row) for row in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("begin immediate")
        try:
            yield self._db
        except BaseException:
            if self._db.in_transaction:  # a full disk ends it by itself
                self._db.execute("rollback")
            raise
        self._db.execute("commit")


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    texts = {name: json.loads(values[name]) for name in ("asked", "settings") if values[name] is not None}
    return Job(**values | texts)
