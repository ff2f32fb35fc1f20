"""What the server costs beside the same edits in this process, in one run: used by load.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import Figure
from traffic import Seen, closed_load

from tav_opt import editing
from tav_opt.client import Client
from tav_opt.config import EditConfig
from tav_opt.engines.onnxruntime import OnnxEngine, open_clip
from tav_opt.serving.server import ServeConfig, Server

MEAN_TOLERANCE, MAX_TOLERANCE = 0.05, 2
"""Of 255: the same graphs in another process."""


class WrongFrames(Exception):
    """The server's frames are not those made in this process: nothing is worth timing."""


def compare(repository: Path, clip: str, edit: EditConfig, *, pairs: int, clients: int) -> list[Figure]:
    """Edits in turn here and on a server started for it; raises WrongFrames."""
    torch.set_num_threads(1)  # as the worker does
    engine = open_clip(repository, clip)
    began = time.perf_counter()
    with Server(ServeConfig(repository=repository, grpc_port=0, http_port=0, metrics_port=0)) as server:
        ready = time.perf_counter() - began
        with Client(server.grpc_url) as client:
            _check(engine, client, clip, edit)
            figures = [Figure(name="start to ready", value=ready, unit="s", goal="≤ 10 s", met=ready <= 10)]
            figures += _overhead(engine, client, clip, edit, pairs)
            figures.append(_first_progress(engine, client, clip, edit, pairs))
            figures.append(_second_inversion(client, clip, edit, engine.info.inversion_steps))
        figures.append(_throughput(engine, server.grpc_url, clip, edit, edits=2 * clients, clients=clients))
    return figures


def _check(engine: OnnxEngine, client: Client, clip: str, edit: EditConfig) -> None:
    difference = np.abs(client.edit(clip, edit).frames.astype(int) - editing.edit(engine, edit))
    if difference.mean() > MEAN_TOLERANCE or difference.max() > MAX_TOLERANCE:
        raise WrongFrames(f"off by {difference.mean():.3f} in the mean and {difference.max()} at most, of 255")


def _overhead(engine: OnnxEngine, client: Client, clip: str, edit: EditConfig, pairs: int) -> list[Figure]:
    """Of `pairs` edits in turn, of all steps and of a tenth: a line through both differences gives the fixed part."""
    few = replace(edit, steps=max(1, edit.steps // 10))
    (_, fewer), (here, more) = (_in_turn(engine, client, clip, config, pairs) for config in (few, edit))
    per_step = (more - fewer) / max(1, edit.steps - few.steps)
    fixed = 1000 * (fewer - per_step * few.steps)
    percent = 100 * more / here
    return [
        Figure(name="an edit in this process", value=here, unit="s", goal="", met=True),
        Figure(name="the server's share on top", value=percent, unit="%", goal="≤ 5 %", met=percent <= 5),
        Figure(name="its fixed part", value=fixed, unit="ms", goal="≤ 10 ms", met=fixed <= 10),
        Figure(name="its part of a step", value=1000 * per_step, unit="ms", goal="", met=True),
    ]


def _in_turn(engine: OnnxEngine, client: Client, clip: str, edit: EditConfig, pairs: int) -> tuple[float, float]:
    """Median seconds of an edit here, and of what it takes longer on the server, pair by pair."""
    here, there = [], []
    for _ in range(pairs):
        here.append(_seconds(lambda: editing.edit(engine, edit)))
        there.append(_seconds(lambda: client.edit(clip, edit)))
    return float(np.median(here)), float(np.median(np.subtract(there, here)))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _first_progress(engine: OnnxEngine, client: Client, clip: str, edit: EditConfig, calls: int) -> Figure:
    """How much later than here the first step is told of, over the time that a step takes here."""
    short = replace(edit, steps=2)
    here, there = [], []
    for _ in range(calls):
        here.append(_told(lambda tell: editing.edit(engine, short, on_progress=tell)))
        there.append(_told(lambda tell: client.edit(clip, short, on_progress=tell)))
    (first, _), (_, step) = np.median(here, axis=0), np.median(np.diff(here, prepend=0, axis=1), axis=0)
    late = (float(np.median(there, axis=0)[0]) - float(first)) / float(step)
    return Figure(name="first progress, later than here", value=late, unit="steps", goal="≤ 1 step", met=late <= 1)


def _told(edit: Callable[[Callable[..., None]], object]) -> list[float]:
    """Seconds from the start of an edit to each step that it tells of."""
    start, told = time.perf_counter(), []
    edit(lambda *_: told.append(time.perf_counter() - start))
    return told


def _second_inversion(client: Client, clip: str, edit: EditConfig, kept: int) -> Figure:
    """Steps of inversion that the second edit with steps unlike the clip's own is told of."""
    anew = replace(edit, inversion_steps=kept + 1, steps=1)
    client.edit(clip, anew)
    with client.stream(clip, anew) as stream:
        steps = sum(progress.stage == "invert" for progress in stream)
    return Figure(name="second edit's inversion", value=steps, unit="steps", goal="0", met=steps == 0)


def _throughput(engine: OnnxEngine, url: str, clip: str, edit: EditConfig, *, edits: int, clients: int) -> Figure:
    alone = _seconds(lambda: [editing.edit(engine, edit) for _ in range(edits)])
    seen: list[Seen] = []
    served = _seconds(lambda: seen.extend(asyncio.run(closed_load(url, clip, edit, clients=clients, edits=edits))))
    assert {s.status for s in seen} == {"OK"}, seen
    share = alone / served
    return Figure(
        name=f"throughput with {clients} waiting clients, of that in this process",
        value=share,
        unit="×",
        goal="≥ 0.95",
        met=share >= 0.95,
    )
