"""Clients that edit all at once, and what they saw: shared by load.py and soak.py."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from presets import prepare

from tav_opt.client import AsyncClient, Retry, ServerError
from tav_opt.config import EditConfig, InputError
from tav_opt.contract import STREAM_MODEL

ONCE = Retry(attempts=1)
REFUSED_PAUSE_SECONDS = 0.1
"""A client of a closed load that is refused asks again after this."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One request as its client saw it; times in seconds of time.perf_counter."""

    client: int
    asked: float
    first: float | None
    """When the first progress came."""
    done: float
    status: str
    """OK, or a gRPC status."""
    inverted: bool
    """Whether the server told of steps of inversion."""


async def ask(client: AsyncClient, number: int, clip: str, edit: EditConfig) -> Seen:
    """One edit, timed."""
    asked, first, inverted, status = time.perf_counter(), None, False, "OK"
    try:
        async with client.stream(clip, edit) as stream:
            async for progress in stream:
                first = first or time.perf_counter()
                inverted |= progress.stage == "invert"
    except ServerError as error:
        status = error.status
    return Seen(client=number, asked=asked, first=first, done=time.perf_counter(), status=status, inverted=inverted)


async def closed_load(
    url: str, clip: str, edit: EditConfig, *, clients: int, seconds: float | None = None, edits: int | None = None
) -> list[Seen]:
    """So many clients, each with a connection of its own, who ask again as soon as they are answered.

    It ends after `seconds` or, over all clients, after `edits`; what is in flight then may end.
    """
    seen: list[Seen] = []
    ends = time.perf_counter() + (float("inf") if seconds is None else seconds)
    left = iter(range(edits)) if edits is not None else iter(int, 1)  # without end

    async def one(number: int) -> None:
        async with AsyncClient(url, retry=ONCE) as client:
            while time.perf_counter() < ends and next(left, None) is not None:
                seen.append(await ask(client, number, clip, edit))
                if seen[-1].status != "OK":
                    await asyncio.sleep(REFUSED_PAUSE_SECONDS)

    await asyncio.gather(*(one(number) for number in range(clients)))
    return seen


async def open_load(url: str, clip: str, edit: EditConfig, *, rate: float, seconds: float, seed: int = 0) -> list[Seen]:
    """Requests that come at random, `rate` a second in the mean, whether earlier ones are answered or not."""
    draw, tasks = random.Random(seed), []
    async with AsyncClient(url, retry=ONCE) as client:
        due, ends = time.perf_counter(), time.perf_counter() + seconds
        while (due := due + draw.expovariate(rate)) < ends:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(client, len(tasks), clip, edit)))
        return list(await asyncio.gather(*tasks))


def summary(seen: list[Seen]) -> dict[str, object]:
    """Figures of a load: counts by status, edits a second, and percentiles in seconds."""
    served = [s for s in seen if s.status == "OK"]
    result: dict[str, object] = {"requests": dict(Counter(s.status for s in seen))}
    if served:
        span = max(s.done for s in served) - min(s.asked for s in served)
        result["edits a second"] = len(served) / span
        result["latency"] = _percentiles([s.done - s.asked for s in served])
        result["first progress"] = _percentiles([s.first - s.asked for s in served if s.first is not None])
    refused = [s.done - s.asked for s in seen if s.status != "OK"]
    if refused:
        result["refused after"] = _percentiles(refused)
    return result


def _percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)} if values else {}


def jain_index(seen: list[Seen], clients: int) -> float:
    """How evenly the clients of a closed load were served: 1 evenly, 1 / clients when one got all (Jain, 1984)."""
    counts = np.bincount([s.client for s in seen if s.status == "OK"], minlength=clients).astype(float)
    return float(counts.sum() ** 2 / (clients * (counts**2).sum()))


def overtaken(seen: list[Seen]) -> int:
    """Of the edits of an open load, how many were done after one that was asked for later."""
    order = [s.done for s in sorted((s for s in seen if s.status == "OK"), key=lambda s: s.asked)]
    return sum(done > min(order[i + 1 :], default=done) for i, done in enumerate(order))


@contextmanager
def exported(preset: str, *, frames: int, size: int | None, steps: int) -> Iterator[tuple[Path, str]]:
    """A model repository with a clip to load the server with → its folder, and the clip's name."""
    from tav_opt.export.exporting import export

    with tempfile.TemporaryDirectory() as folder:
        if (Path(preset) / STREAM_MODEL).is_dir():
            names = sorted(path.parent.name for path in Path(preset).glob(f"{STREAM_MODEL}/1/clips/*/manifest.json"))
            if not names:
                raise InputError(f"{preset} is a model repository without a clip")
            yield Path(preset), names[0]
            return
        ckpt = prepare(preset, Path(folder), frames=frames, size=size, steps=steps)
        yield Path(folder) / "repository", export(ckpt, Path(folder) / "repository", name="benchmark").name
