"""What the server costs beside its worker's own loop in this process, in one run: used by load.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import Figure
from traffic import Seen, closed_load
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import np_to_triton_dtype

from tav_opt.client import Client
from tav_opt.config import EditConfig, OnProgress, WorkerConfig
from tav_opt.contract import STREAM_MODEL, UNARY_MODEL, VERSION, to_tensors
from tav_opt.engines.registry import best_device
from tav_opt.serving.host.serve_config import ServeConfig
from tav_opt.serving.host.server import Server
from tav_opt.serving.opening import open_editor, warm_up
from tav_opt.serving.report import Report

MEAN_TOLERANCE, MAX_TOLERANCE = 0.05, 2
"""Of 255: the same graphs in another process."""


class WrongFrames(Exception):
    """The server's frames are not those made in this process: nothing is worth timing."""


class Here:
    """The worker's editor, opened and warmed as the worker opens it, without a server around it."""

    def __init__(self, repository: Path, clip: str) -> None:
        folder = repository / STREAM_MODEL / str(VERSION)
        self._editor, clips = open_editor(folder, WorkerConfig(), device=best_device())
        self.info = clips.get(clip).info
        warm_up(clips.get(clip))

    def edit(self, clip: str, edit: EditConfig, *, on_progress: OnProgress | None = None) -> np.ndarray:
        """The frames, as `Client.edit` has them."""

        def send(told: dict[str, np.ndarray]) -> None:
            if on_progress is not None:
                on_progress(told["stage"][0].decode(), int(told["step"][0]), int(told["steps"][0]))

        return self._editor.answer(to_tensors(clip, edit), send, lambda: None, Report())["frames"]


def compare(repository: Path, clip: str, edit: EditConfig, *, pairs: int, clients: int) -> list[Figure]:
    """Edits in turn here and on a server started for it; raises WrongFrames."""
    here = Here(repository, clip)
    began = time.perf_counter()
    with Server(ServeConfig(repository=repository, grpc_port=0, http_port=0, metrics_port=0)) as server:
        ready = time.perf_counter() - began
        with Client(server.grpc_url) as client:
            _check(here, client, clip, edit)
            figures = [Figure(name="start to ready", value=ready, unit="s", goal="≤ 10 s", met=ready <= 10)]
            figures += _overhead(here, client, clip, edit, pairs)
            figures.append(_first_progress(here, client, clip, edit, pairs))
            figures.append(_second_inversion(client, clip, edit, here.info.inversion_steps))
            figures += _gateway(repository, server.grpc_url, client, clip, edit, pairs)
        figures.append(_throughput(here, server.grpc_url, clip, edit, edits=2 * clients, clients=clients))
    return figures


def _check(here: Here, client: Client, clip: str, edit: EditConfig) -> None:
    difference = np.abs(client.edit(clip, edit).frames.astype(int) - here.edit(clip, edit))
    if difference.mean() > MEAN_TOLERANCE or difference.max() > MAX_TOLERANCE:
        raise WrongFrames(f"off by {difference.mean():.3f} in the mean and {difference.max()} at most, of 255")


def _overhead(here: Here, client: Client, clip: str, edit: EditConfig, pairs: int) -> list[Figure]:
    """Of `pairs` edits in turn, of all steps and of a tenth: a line through both differences gives the fixed part."""
    few = replace(edit, steps=max(1, edit.steps // 10))
    (_, fewer), (alone, more) = (_in_turn(here, client, clip, config, pairs) for config in (few, edit))
    per_step = (more - fewer) / max(1, edit.steps - few.steps)
    fixed = 1000 * (fewer - per_step * few.steps)
    percent = 100 * more / alone
    return [
        Figure(name="an edit in this process", value=alone, unit="s", goal="", met=True),
        Figure(name="the server's share on top", value=percent, unit="%", goal="≤ 5 %", met=percent <= 5),
        Figure(name="its fixed part", value=fixed, unit="ms", goal="≤ 10 ms", met=fixed <= 10),
        Figure(name="its part of a step", value=1000 * per_step, unit="ms", goal="", met=True),
    ]


def _gateway(repository: Path, url: str, client: Client, clip: str, edit: EditConfig, pairs: int) -> list[Figure]:
    """What requests take longer than on a bare server, in turn: an edit that is kept there, and one that is made."""
    bare = ServeConfig(repository=repository, grpc_port=0, http_port=0, metrics_port=0, direct=True)
    with Server(bare) as server, Client(server.grpc_url) as direct:
        way = _longer(_kept(server.grpc_url, clip, edit), _kept(url, clip, edit), 10 * pairs)
        alone, more = _in_turn(direct, client, clip, edit, pairs)
    percent = 100 * more / alone
    return [
        Figure(name="the gateway's way", value=1000 * way, unit="ms", goal="≤ 3 ms", met=1000 * way <= 3),
        Figure(name="the gateway's share of an edit", value=percent, unit="%", goal="≤ 2 %", met=percent <= 2),
    ]


def _kept(url: str, clip: str, edit: EditConfig) -> Callable[[], object]:
    """Asks the unary model for an edit that it has made before: request, frames, and no step."""
    client = InferenceServerClient(url)
    inputs = []
    for name, array in to_tensors(clip, edit).items():
        inputs.append(InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    return lambda: client.infer(UNARY_MODEL, inputs)


def _longer(one: Callable[[], object], other: Callable[[], object], pairs: int) -> float:
    """Median seconds that the other takes longer, pair by pair, after a first one of each."""
    seconds = [(_seconds(one), _seconds(other)) for _ in range(1 + pairs)][1:]
    return float(np.median([second - first for first, second in seconds]))


def _in_turn(here: Here | Client, client: Client, clip: str, edit: EditConfig, pairs: int) -> tuple[float, float]:
    """Median seconds of an edit here, and of what it takes longer on the server, pair by pair."""
    alone, served = [], []
    for _ in range(pairs):
        alone.append(_seconds(lambda: here.edit(clip, edit)))
        served.append(_seconds(lambda: client.edit(clip, edit)))
    return float(np.median(alone)), float(np.median(np.subtract(served, alone)))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _first_progress(here: Here, client: Client, clip: str, edit: EditConfig, calls: int) -> Figure:
    """How much later than here the first step is told of, over the time that a step takes here."""
    short = replace(edit, steps=2)
    alone, served = [], []
    for _ in range(calls):
        alone.append(_told(lambda tell: here.edit(clip, short, on_progress=tell)))
        served.append(_told(lambda tell: client.edit(clip, short, on_progress=tell)))
    step = float(np.median([second - first for first, second, *_ in alone]))
    late = float(np.median([s[0] for s in served]) - np.median([a[0] for a in alone])) / step
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


def _throughput(here: Here, url: str, clip: str, edit: EditConfig, *, edits: int, clients: int) -> Figure:
    alone = _seconds(lambda: [here.edit(clip, edit) for _ in range(edits)])
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
