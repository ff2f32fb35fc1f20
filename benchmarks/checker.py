"""Is every answer one that the repository allowed? In the manner of Jepsen: `python benchmarks/checker.py --help`.

Clients mix clips, seeds, steps, sources, both models and cancels on `tav-opt serve`, whose tritonserver is killed now
and then, while clips are added, replaced and removed. Every answer is compared with the edit in this process, and the
history with all that could have been (history.py). Exit status 1: an answer was wrong, or ended as none should.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import history
import numpy as np
import psutil
import tyro
from common import header, machine
from history import Event
from presets import prepare
from traffic import ONCE

from tav_opt import checkpoint, command, editing
from tav_opt.client import AsyncClient, ServerError
from tav_opt.config import EditConfig, InputError
from tav_opt.contract import UNARY_MODEL
from tav_opt.engines.registry import open_clip
from tav_opt.export.exporting import add
from tav_opt.files import write_json
from tav_opt.loopback import urlopen
from tav_opt.repository.clips import remove

VERSIONS = ("a", "b", "c")
"""Of a clip: checkpoints whose values differ."""
KEPT = "kept"
"""A clip that nobody touches, so that its base stays."""
CHANGED = ("one", "two")
STATUS = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}
"""gRPC's for HTTP's."""
EXPECTED = {"OK", "NOT_FOUND", "UNAVAILABLE", "CANCELLED", "SUSPECT"}
OF_THE_DEAD = re.compile("the server died .* while it had this request")
"""A request that was in flight at two kills is refused for a while."""
REPLY_SECONDS = 120.0
REFUSED_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Check:
    """Mixed load on a server that is killed, and on clips that change."""

    minutes: float = 30.0
    clients: int = 6
    preset: str = "demo"
    """demo, sd15 (random weights), or a checkpoint's folder."""
    frames: int = 8
    size: int | None = None
    kill_seconds: float = 30.0
    """Between two kills of tritonserver, in the mean; 0: none."""
    change_seconds: float = 2.0
    """Between two changes of a clip, in the mean."""
    seed: int = 0
    out: Path = Path("benchmarks/results/checker.json")
    history: Path | None = None
    """Where every event is kept, one JSON object a line; default: beside `out`."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One way to edit a clip."""

    name: str
    edit: EditConfig
    source: int | None = None
    """Seed of the frames that are sent in the clip's place."""


def ways() -> list[Asked]:
    """Prompts, steps, seeds and sources, mixed."""
    one = EditConfig(prompts=("a red thing",), guidance_scale=7.5, steps=2)
    found = [Asked(name=f"steps {n}", edit=replace(one, prompts=("an old thing",), steps=n)) for n in (1, 2, 3)]
    found += [Asked(name=f"noise {seed}", edit=replace(one, inversion=False, seed=seed)) for seed in range(4)]
    found += [Asked(name=f"eta, seed {seed}", edit=replace(one, eta=1.0, seed=seed)) for seed in range(4)]
    found += [Asked(name=f"source {seed}", edit=replace(one, inversion_steps=2), source=seed) for seed in range(3)]
    return [*found, Asked(name="two prompts", edit=replace(one, prompts=("a blue thing", "a red thing")))]


class Truth:
    """The edits in this process, of every version, by the engine that the server has."""

    def __init__(self, repository: Path) -> None:
        self._engines = {name: open_clip(repository, name) for name in VERSIONS}
        info = self._engines[VERSIONS[0]].info
        self.shape = (info.frames, info.height, info.width, 3)
        """Of a clip's frames."""
        self._answers: dict[str, np.ndarray] = {}
        """What was served, by its hash."""
        self._edit = cache(self._edited)
        self._asked = {asked.name: asked for asked in ways()}
        self._matching = cache(self._versions)

    def source(self, asked: Asked) -> np.ndarray | None:
        """uint8 (f, H, W, 3)."""
        if asked.source is None:
            return None
        return np.random.default_rng(asked.source).integers(0, 256, self.shape, dtype=np.uint8)

    def note(self, frames: np.ndarray) -> str:
        """The hash of an answer, which is kept to be judged."""
        name = hashlib.sha256(repr(frames.shape).encode() + frames.tobytes()).hexdigest()
        self._answers.setdefault(name, frames)
        return name

    def versions(self, event: Event) -> set[str]:
        """Of which a served edit shows."""
        return self._matching(event.settings, event.answer)

    def _versions(self, settings: str, answer: str) -> set[str]:
        return {version for version in VERSIONS if alike(self._answers[answer], self._edit(version, settings))}

    def _edited(self, version: str, settings: str) -> np.ndarray:
        asked = self._asked[settings]
        return editing.edit(self._engines[version], asked.edit, frames=self.source(asked))

    def check_apart(self) -> None:
        """Raises InputError where two versions cannot be told from each other by some edit."""
        for name in self._asked:
            edits = [self._edit(version, name) for version in VERSIONS]
            if any(alike(one, other) for i, one in enumerate(edits) for other in edits[:i]):
                raise InputError(f"the versions' edits by {name!r} are alike: nothing could be told from them")


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Within what a batch, or another number of threads, changes."""
    if one.shape != other.shape:
        return False
    difference = np.abs(one.astype(int) - other)
    return bool(difference.mean() <= 0.05 and difference.max() <= 2)


@dataclass
class Run:
    """What all take part in: where, until when, and what has happened."""

    grpc: str
    http: str
    ends: float
    truth: Truth
    events: list[Event] = field(default_factory=list)

    async def noted(self, act: Awaitable[str], **event: Any) -> str:
        """Waits for an act → its outcome, which is kept with its times."""
        began = time.monotonic()
        answer, outcome = "", "OK"
        try:
            answer = await act
        except ServerError as error:
            outcome = error.status
        except InputError as error:
            outcome = "SUSPECT" if OF_THE_DEAD.search(str(error)) else "NOT_FOUND" if unknown(error) else str(error)
        self.events.append(Event(began=began, ended=time.monotonic(), outcome=outcome, answer=answer, **event))
        return outcome


def unknown(error: InputError) -> bool:
    return bool(re.search("clip '.*' is unknown", str(error)))


async def visit(run: Run, number: int, seed: int) -> None:
    """One client: act after act, on a connection that is made anew now and then."""
    draw, asked = random.Random(seed), ways()
    while time.monotonic() < run.ends:
        async with AsyncClient(run.grpc, retry=ONCE) as client:
            for _ in range(5):
                clip, way = draw.choice((KEPT, *CHANGED)), _varied(draw.choice(asked), draw)
                act = draw.choices((_streamed, _over_http, _cancelled), (4, 3, 2))[0]
                kind, who = "cancel" if act is _cancelled else "edit", f"{number}{act.__name__}"
                event = {"kind": kind, "who": who, "clip": clip, "settings": way.name}
                if await run.noted(act(run, client, clip, way), **event) not in ("OK", "NOT_FOUND"):
                    await asyncio.sleep(REFUSED_PAUSE_SECONDS)


def _varied(way: Asked, draw: random.Random) -> Asked:
    """Mostly another request, for the same frames: one that was in flight at two kills is not asked for in vain."""
    if not way.edit.inversion or way.edit.eta or draw.random() < 0.3:
        return way
    return replace(way, edit=replace(way.edit, seed=draw.getrandbits(32)))


async def _streamed(run: Run, client: AsyncClient, clip: str, way: Asked) -> str:
    found = await client.edit(clip, way.edit, source_frames=run.truth.source(way))
    return run.truth.note(found.frames)


async def _cancelled(run: Run, client: AsyncClient, clip: str, way: Asked) -> str:
    async with client.stream(clip, replace(way.edit, steps=1000), source_frames=run.truth.source(way)) as stream:
        for _ in range(way.edit.steps):
            await anext(stream)
    return ""


async def _over_http(run: Run, _client: AsyncClient, clip: str, way: Asked) -> str:
    """By the unary model, which keeps its answers."""
    names = ("steps", "guidance_scale", "eta", "seed", "inversion", "inversion_steps")
    settings = {name: getattr(way.edit, name) for name in names}
    body: dict[str, Any] = {"clip": clip, "prompt": list(way.edit.prompts)}
    body |= {name: value for name, value in settings.items() if value is not None}
    source = run.truth.source(way)
    body |= {} if source is None else {"source_frames": source.tolist()}
    found = await asyncio.to_thread(_posted, f"{run.http}/v2/models/{UNARY_MODEL}/generate", json.dumps(body).encode())
    shape = (len(way.edit.prompts), *run.truth.shape)
    return run.truth.note(np.array(found["frames"], np.uint8).reshape(shape))


def _posted(url: str, body: bytes) -> Any:
    try:
        with urlopen(urllib.request.Request(url, body), REPLY_SECONDS) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        told = json.loads(error.read())["error"]
        if error.code in (400, 404):
            raise InputError(told) from None
        raise ServerError(told, STATUS.get(error.code, f"HTTP {error.code}: {told}")) from None


async def keep(run: Run, repository: Path, checkpoints: dict[str, Path], config: Check) -> None:
    """The keeper of the clips: adds, replaces and removes them, one change after the other."""
    draw, there = random.Random(config.seed), dict.fromkeys(CHANGED)
    while time.monotonic() < run.ends:
        await asyncio.sleep(draw.uniform(0, 2 * config.change_seconds))
        clip = draw.choice(CHANGED)
        version = draw.choice([name for name in (None, *VERSIONS, *VERSIONS) if name != there[clip]])
        await run.noted(
            _changed(repository, clip, version, checkpoints), kind="change", who="keeper", clip=clip, version=version
        )
        there[clip] = version


async def _changed(repository: Path, clip: str, version: str | None, checkpoints: dict[str, Path]) -> str:
    if version is None:
        await asyncio.to_thread(remove, repository, clip)
    else:
        await asyncio.to_thread(add, checkpoints[version], repository, name=clip)
    return ""


async def kill(run: Run, host: psutil.Process, config: Check) -> None:
    """Kills tritonserver now and then, and not again before it has answered."""
    draw, killed = random.Random(config.seed), 0.0
    while config.kill_seconds and time.monotonic() < run.ends:
        await asyncio.sleep(draw.uniform(0, 2) * config.kill_seconds)
        if not any(event.kind == "edit" and event.outcome == "OK" and event.began > killed for event in run.events):
            continue
        for process in [child for child in host.children() if child.name() == "tritonserver"]:
            await run.noted(asyncio.to_thread(process.kill), kind="kill", who="killer")
            killed = run.events[-1].ended


@contextmanager
def serving(repository: Path, cache: Path) -> Iterator[tuple[Popen[str], str, str]]:
    """`tav-opt serve` in a process of its own → it, and its addresses for gRPC and HTTP."""
    code = "import sys; from tav_opt.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--restarts", "1000"]
    line = [sys.executable, "-c", code, "serve", "--repository", str(repository), "--cache", str(cache), *options]
    with Popen(line, stdout=PIPE, text=True) as host:
        assert host.stdout is not None
        shown = [host.stdout.readline().split() for _ in range(4)]
        try:
            if [line[:1] for line in shown] != [["ready"], ["gRPC"], ["HTTP"], ["metrics"]]:
                raise InputError("the server did not start: see above")
            yield host, shown[1][1], shown[2][1]
        finally:
            host.terminate()


async def checked(config: Check, repository: Path, checkpoints: dict[str, Path], truth: Truth, cache: Path) -> Run:
    """The whole of it, on a server of its own → what happened."""
    with serving(repository, cache) as (host, grpc, http):
        run = Run(grpc=grpc, http=http, ends=time.monotonic() + 60 * config.minutes, truth=truth)
        now = time.monotonic()
        run.events.append(Event(kind="change", who="keeper", began=now, ended=now, clip=KEPT, version=VERSIONS[0]))
        visits = [visit(run, number, 1000 * config.seed + number) for number in range(config.clients)]
        changes = keep(run, repository, checkpoints, config)
        await asyncio.gather(*visits, changes, kill(run, psutil.Process(host.pid), config))
        if host.poll() is not None:
            raise InputError(f"the server ended with status {host.returncode}")
    return run


def main(config: Check) -> int:
    """Checks, prints and judges; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoints = _checkpoints(config, work)
        for name, path in checkpoints.items():
            add(path, work / "truth", name=name)
        truth = Truth(work / "truth")
        truth.check_apart()
        shutil.copytree(work / "truth", work / "repository")
        add(checkpoints[VERSIONS[0]], work / "repository", name=KEPT)
        remove(work / "repository", VERSIONS)
        run = asyncio.run(checked(config, work / "repository", checkpoints, truth, work / "cache"))
        found = _faults(run)
    return _report(config, run, found)


def _checkpoints(config: Check, work: Path) -> dict[str, Path]:
    """One of each version."""
    first = prepare(config.preset, work, frames=config.frames, size=config.size, steps=2)
    tuned, found = checkpoint.load(first), {}
    for number, name in enumerate(VERSIONS):
        found[name] = work / name
        values = {key: value * (1 + number) for key, value in tuned.values.items()}
        checkpoint.save(replace(tuned, values=values), found[name], settings={})
    return found


def _faults(run: Run) -> list[str]:
    odd = Counter(f"{event.kind}: {event.outcome}" for event in run.events if event.outcome not in EXPECTED)
    failed = [event for event in run.events if event.kind in ("change", "kill") and event.outcome != "OK"]
    found = [f"{count} × {name}" for name, count in odd.items()] + [f"it did not succeed: {event}" for event in failed]
    if not any(event.kind == "edit" and event.outcome == "OK" for event in run.events):
        found.append("nothing was answered, and so nothing compared")
    return found + history.faults(run.events, run.truth.versions)


def _report(config: Check, run: Run, found: list[str]) -> int:
    what = f"checked for {config.minutes:g} minutes, {config.clients} clients, {config.preset}"
    outcomes = Counter(f"{event.kind}: {event.outcome}" for event in run.events)
    print(header(what))
    print("\n".join(f"- {name}: {count}" for name, count in sorted(outcomes.items())))
    kept = config.history or config.out.with_suffix(".jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)
    history.write(run.events, kept)
    content = {"what": what, "command": " ".join(sys.argv), "machine": machine(), "outcomes": outcomes, "faults": found}
    write_json(config.out, content)
    print(f"history: {kept}")
    print("\n".join(found) if found else "every answer is one that the repository allowed")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(command.run("checker", lambda arguments: main(tyro.cli(Check, args=arguments))))
