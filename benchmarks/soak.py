"""A server under mixed load for half an hour: does anything grow, leak or go wrong? `python benchmarks/soak.py --help`.

Clients edit, cancel, run into deadlines, hang up, and ask for nonsense. Memory is sampled throughout; open files,
sockets, threads and shared memory are compared between two moments of rest, one after the warm-up and one at the end.
Exit status 1: memory grew faster than allowed, something was left open, an answer was wrong, or a process died.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import psutil
import tyro
from common import header, machine
from traffic import ONCE, REFUSED_PAUSE_SECONDS, exported

from tav_opt import command
from tav_opt.client import AsyncClient, ServerError
from tav_opt.config import EditConfig, InputError
from tav_opt.contract import STREAM_MODEL
from tav_opt.files import write_json
from tav_opt.serving.host.serve_config import ServeConfig
from tav_opt.serving.host.server import Server, ServerDied

EDITS = tuple(EditConfig(prompts=(f"a {word} thing",), steps=2) for word in ("red", "blue", "old"))
"""What is asked for and compared with its first answer."""
REST_SECONDS = 5.0
SAMPLE_SECONDS = 2.0
LAST_LINES = 60
"""Of the server's log, shown when it died."""
SLACK = 2
"""Files, sockets and threads that may differ between two moments of rest: keep-alive and pools come and go."""


@dataclass(frozen=True, kw_only=True)
class Soak:
    """Mixed load on a server started here."""

    minutes: float = 30.0
    clients: int = 6
    preset: str = "demo"
    """demo, sd15 (random weights), a checkpoint's folder, or a model repository, whose first clip is taken."""
    frames: int = 8
    size: int | None = None
    mib_per_minute: float = 0.5
    """How fast memory may grow; half a MiB a minute are 15 in half an hour."""
    warm_up: float = 0.2
    """Share of the time whose growth does not count: pools and arenas fill."""
    seed: int = 0
    out: Path = Path("benchmarks/results/soak.json")


@dataclass(frozen=True)
class Usage:
    """What the server and its workers hold."""

    mib: float
    """Memory that is theirs alone (USS)."""
    files: int
    sockets: int
    threads: int
    regions: int
    """Shared-memory regions of this server."""
    region_mib: float

    @classmethod
    def of(cls, server: Server) -> Usage:
        root = psutil.Process(server.process.pid)
        processes = [root, *root.children(recursive=True)]
        regions = list(Path("/dev/shm").glob(f"{server._shared_memory}*"))  # nosec B108  # only looked at
        return cls(
            mib=sum(p.memory_full_info().uss for p in processes) / 2**20,
            files=sum(p.num_fds() for p in processes),
            sockets=sum(len(p.net_connections(kind="inet")) for p in processes),
            threads=sum(p.num_threads() for p in processes),
            regions=len(regions),
            region_mib=sum(r.stat().st_size for r in regions) / 2**20,
        )


@dataclass
class Record:
    """What happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    answers: dict[int, np.ndarray] = field(default_factory=dict)
    samples: list[tuple[float, Usage]] = field(default_factory=list)


class Visitor:
    """One client; each of its acts is something that real ones do."""

    def __init__(self, server: Server, clip: str, record: Record, seed: int) -> None:
        self._server, self._clip, self._record, self._draw = server, clip, record, random.Random(seed)

    async def visit(self, ends: float) -> None:
        """Act after act, on a connection that is made anew now and then."""
        acts = (self._edit, self._edit, self._edit, self._cancel, self._deadline, self._nonsense, self._hang_up)
        while time.monotonic() < ends and self._server.process.poll() is None:
            async with AsyncClient(self._server.grpc_url, retry=ONCE) as client:
                for act in self._draw.choices(acts, k=5):
                    if time.monotonic() < ends:
                        await self._counted(act(client), act.__name__.removeprefix("_"))

    async def _counted(self, act: Awaitable[None], name: str) -> None:
        try:
            await act
            outcome = "OK"
        except ServerError as error:
            outcome = error.status
            if outcome == "UNAVAILABLE":
                await asyncio.sleep(REFUSED_PAUSE_SECONDS)
        except InputError:
            outcome = "INVALID"
        except OSError as error:
            outcome = type(error).__name__
            await asyncio.sleep(REFUSED_PAUSE_SECONDS)
        self._record.outcomes[f"{name}: {outcome}"] += 1

    async def _edit(self, client: AsyncClient) -> None:
        number = self._draw.randrange(len(EDITS))
        frames = (await client.edit(self._clip, EDITS[number])).frames
        self._record.wrong += not np.array_equal(frames, self._record.answers.setdefault(number, frames))

    async def _cancel(self, client: AsyncClient) -> None:
        async with client.stream(self._clip, replace(EDITS[0], steps=1000)) as stream:
            for _ in range(self._draw.randint(0, 4)):
                await anext(stream)

    async def _deadline(self, client: AsyncClient) -> None:
        await client.edit(self._clip, replace(EDITS[0], steps=1000), deadline_s=self._draw.uniform(0.05, 1))

    async def _nonsense(self, client: AsyncClient) -> None:
        bad = self._draw.choice([("nowhere", EDITS[0]), (self._clip, replace(EDITS[0], steps=0)), (self._clip, [" "])])
        await client.edit(*bad)

    async def _hang_up(self, _client: AsyncClient) -> None:
        """Asks over HTTP and is gone after the first bytes, with a reset."""
        host, port = self._server.http_url.removeprefix("http://").split(":")
        body = json.dumps({"clip": self._clip, "prompt": "a red thing", "steps": 1000}).encode()
        reader, writer = await asyncio.open_connection(host, int(port))
        path = f"/v2/models/{STREAM_MODEL}/generate_stream"
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await reader.read(10)
        linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()


async def _load(server: Server, clip: str, config: Soak, seconds: float, record: Record, seed: int) -> None:
    ends = time.monotonic() + seconds
    visitors = [Visitor(server, clip, record, 1000 * seed + number).visit(ends) for number in range(config.clients)]

    async def sample() -> None:
        while time.monotonic() < ends and server.process.poll() is None:
            record.samples.append((time.monotonic(), Usage.of(server)))
            await asyncio.sleep(SAMPLE_SECONDS)

    await asyncio.gather(sample(), *visitors)
    _check_alive(server)


def _check_alive(server: Server) -> None:
    try:
        server.wait(0)
    except ServerDied:
        print(*list(server.log)[-LAST_LINES:], sep="\n", file=sys.stderr)
        raise


def slope(samples: list[tuple[float, Usage]]) -> float:
    """MiB a minute: the median of the slopes between all pairs of samples (Theil-Sen), which outliers do not move."""
    seconds, mib = np.array([[at, usage.mib] for at, usage in samples]).T
    i, j = np.triu_indices(len(seconds), k=1)
    return float(np.median((mib[j] - mib[i]) / (seconds[j] - seconds[i])) * 60)


def faults(config: Soak, record: Record, rests: tuple[Usage, Usage], growth: float, pids: tuple[set, set]) -> list[str]:
    """What is not as it should be, in words."""
    found = []
    if growth > config.mib_per_minute:
        found.append(f"memory grew by {growth:.2f} MiB a minute, {config.mib_per_minute} at most")
    for name in ("files", "sockets", "threads", "regions"):
        before, after = (getattr(rest, name) for rest in rests)
        if after > before + SLACK:
            found.append(f"{name}: {before} at rest before, {after} after")
    if rests[1].region_mib > rests[0].region_mib * 1.05 + 1:
        found.append(f"shared memory: {rests[0].region_mib:.1f} MiB before, {rests[1].region_mib:.1f} after")
    if record.wrong:
        found.append(f"{record.wrong} answers differ from the first of their kind")
    if pids[0] != pids[1]:
        found.append(f"processes {sorted(pids[0] - pids[1])} are gone")
    expected = {"OK", "UNAVAILABLE", "INVALID", "DEADLINE_EXCEEDED"}
    if odd := {key: n for key, n in record.outcomes.items() if key.rpartition(": ")[2] not in expected}:
        found.append(f"unexpected ends: {odd}")
    return found


def _processes(server: Server) -> set[int]:
    root = psutil.Process(server.process.pid)
    return {p.pid for p in [root, *root.children(recursive=True)] if p.status() != psutil.STATUS_ZOMBIE}


def _rest(server: Server) -> Usage:
    gc.collect()  # connections of our own that wait to be collected are sockets of the server's too
    time.sleep(REST_SECONDS)
    return Usage.of(server)


def main(config: Soak) -> int:
    """Soaks, prints and judges; returns the exit status."""
    seconds, record, first = 60 * config.minutes, Record(), Record()
    with ExitStack() as stack:
        made = exported(config.preset, frames=config.frames, size=config.size, steps=4)
        repository, clip = stack.enter_context(made)
        free = ServeConfig(repository=repository, grpc_port=0, http_port=0, metrics_port=0)
        server = stack.enter_context(Server(free))
        asyncio.run(_load(server, clip, config, config.warm_up * seconds, first, config.seed))
        record.answers = first.answers
        before, pids = _rest(server), _processes(server)
        asyncio.run(_load(server, clip, config, (1 - config.warm_up) * seconds, record, config.seed + 1))
        rests, after = (before, _rest(server)), _processes(server)
    growth = slope(record.samples)
    found = faults(config, record, rests, growth, (pids, after))
    _report(config, record, rests, growth, found)
    return int(bool(found))


def _report(config: Soak, record: Record, rests: tuple[Usage, Usage], growth: float, found: list[str]) -> None:
    what = f"soak of {config.minutes:g} minutes, {config.clients} clients, {config.preset}"
    print(header(what))
    print("\n| at rest | after warm-up | at the end |\n|---|---:|---:|")
    for name in (f.name for f in fields(Usage)):
        print(f"| {name} | {getattr(rests[0], name):.6g} | {getattr(rests[1], name):.6g} |")
    print(f"\nslope of memory: {growth:+.3f} MiB a minute over {len(record.samples)} samples")
    print(f"wrong answers: {record.wrong} of {record.outcomes['edit: OK']}")
    print("\n".join(f"- {name}: {count}" for name, count in sorted(record.outcomes.items())))
    content = {
        "what": what,
        "command": " ".join(sys.argv),
        "machine": machine(),
        "slope_mib_per_minute": growth,
        "rests": [asdict(rest) for rest in rests],
        "outcomes": record.outcomes,
        "faults": found,
    }
    write_json(config.out, content)
    print("\n".join(found) if found else "nothing grew, leaked or went wrong")


if __name__ == "__main__":
    sys.exit(command.run("soak", lambda arguments: main(tyro.cli(Soak, args=arguments))))
