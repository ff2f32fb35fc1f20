"""Edits a second of waiting clients of one clip, by how many requests a worker has in hand.

`python benchmarks/batching.py --help`; servers of each setting are loaded in turn,
in several rounds. Triton stands without its gateway.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import header, machine
from traffic import closed_load, exported, summary

from tav_opt import command
from tav_opt.config import EditConfig, EngineChoice, WorkerConfig
from tav_opt.files import write_json
from tav_opt.serving.host.serve_config import ServeConfig
from tav_opt.serving.host.server import Server

HEAD = "| in hand | edits a second | against the first | latency | first progress |\n|---:|---:|---:|---:|---:|"


@dataclass(frozen=True, kw_only=True)
class Batching:
    """A closed load on servers that differ in --batch-requests."""

    preset: str = "demo"
    """As in load.py."""
    frames: int = 8
    size: int | None = None
    steps: int = 20
    guidance: float = 7.5
    clients: int = 8
    edits: int = 16
    """Of all clients, for each setting and round."""
    in_hand: tuple[int, ...] = (1, 2, 4, 8)
    """Settings of --batch-requests."""
    engine: EngineChoice = "auto"
    rounds: int = 5
    out: Path = Path("benchmarks/results/batching.json")


def main(config: Batching) -> int:
    """Loads each server in turn and prints the medians."""
    edit = EditConfig(prompts=("a red thing",), steps=config.steps, guidance_scale=config.guidance)
    found: dict[int, list[dict[str, float]]] = {number: [] for number in config.in_hand}
    with exported(config.preset, frames=config.frames, size=config.size, steps=config.steps) as (repository, clip):
        for _ in range(config.rounds):
            for number in config.in_hand:
                found[number].append(_loaded(config, repository, clip, edit, number))
    what = f"{config.clients} waiting clients of one clip on {config.preset}: {edit.steps} DDIM steps, guided"
    print(f"{header(what)}\n\n{HEAD}")
    medians = {
        number: {name: float(np.median([one[name] for one in runs])) for name in runs[0]}
        for number, runs in found.items()
    }
    first = medians[config.in_hand[0]]["edits a second"]
    for number, median in medians.items():
        speed = median["edits a second"]
        latency, told = median["latency"], median["first progress"]
        print(f"| {number} | {speed:.3f} | {speed / first:.2f} × | {latency:.1f} s | {told:.1f} s |")
    content = {"what": what, "command": " ".join(sys.argv), "machine": machine(), "medians": medians, "rounds": found}
    write_json(config.out, content)
    return 0


def _loaded(config: Batching, repository: Path, clip: str, edit: EditConfig, in_hand: int) -> dict[str, float]:
    worker = WorkerConfig(engine=config.engine, batch_requests=in_hand)
    free = ServeConfig(repository=repository, worker=worker, grpc_port=0, http_port=0, metrics_port=0, direct=True)
    with Server(free) as server:
        asyncio.run(closed_load(server.grpc_url, clip, edit, clients=in_hand, edits=in_hand))  # warm-up
        load = closed_load(server.grpc_url, clip, edit, clients=config.clients, edits=config.edits)
        seen = asyncio.run(load)
    assert {one.status for one in seen} == {"OK"}, seen
    found: dict[str, Any] = summary(seen)
    return {
        "edits a second": found["edits a second"],
        "latency": found["latency"]["p50"],
        "first progress": found["first progress"]["p50"],
    }


if __name__ == "__main__":
    sys.exit(command.run("batching", lambda arguments: main(tyro.cli(Batching, args=arguments))))
