"""A server under load: `python benchmarks/load.py --help`.

With --url a running server is loaded. Without, one is started here and first compared with its worker's own loop in
this process; if its frames are wrong, nothing is timed and the exit status is 1.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common import Figure, header, machine
from overhead import WrongFrames, compare
from traffic import closed_load, exported, jain_index, open_load, overtaken, summary

from tav_opt import command
from tav_opt.config import EditConfig, InputError
from tav_opt.files import write_json
from tav_opt.serving.host.serve_config import ServeConfig
from tav_opt.serving.host.server import Server


@dataclass(frozen=True, kw_only=True)
class Load:
    """Closed load (each client asks again once answered) and open load (requests come at random) on a server."""

    url: str | None = None
    """gRPC address of a running server; without it, one is started on `preset`."""
    clip: str | None = None
    """Exported clip of the running server."""
    preset: str = "demo"
    """demo, sd15 (random weights), a checkpoint's folder, or a model repository, whose first clip is taken."""
    frames: int = 8
    size: int | None = None
    steps: int = 20
    guidance: float = 7.5
    clients: int = 8
    """Of the closed load."""
    seconds: float = 30.0
    """Of each load."""
    rate: float | None = None
    """Requests a second of the open load; default: four fifths of what the closed load reached."""
    pairs: int = 10
    """Edits here and there, in turn, for the comparison."""
    out: Path = Path("benchmarks/results/load.json")


def main(config: Load) -> int:
    """Compares, loads and prints; returns the exit status."""
    edit = EditConfig(prompts=("a red thing",), steps=config.steps, guidance_scale=config.guidance)
    if config.url is not None:
        if config.clip is None:
            raise InputError("--url needs --clip, the name of a clip that is exported there")
        return _report(config, edit, [], asyncio.run(_loads(config, config.url, config.clip, edit)))
    with exported(config.preset, frames=config.frames, size=config.size, steps=config.steps) as (repository, clip):
        try:
            figures = compare(repository, clip, edit, pairs=config.pairs, clients=config.clients)
        except WrongFrames as error:
            print(f"load: the server's frames are wrong: {error}: nothing was timed", file=sys.stderr)
            return 1
        free = ServeConfig(repository=repository, grpc_port=0, http_port=0, metrics_port=0)
        with Server(free) as server:
            return _report(config, edit, figures, asyncio.run(_loads(config, server.grpc_url, clip, edit)))


async def _loads(config: Load, url: str, clip: str, edit: EditConfig) -> dict[str, dict[str, Any]]:
    await closed_load(url, clip, edit, clients=1, edits=1)  # warm-up
    seen = await closed_load(url, clip, edit, clients=config.clients, seconds=config.seconds)
    closed = {**summary(seen), "fairness (Jain)": jain_index(seen, config.clients)}
    rate = config.rate or 0.8 * float(str(closed.get("edits a second", 1.0)))
    seen = await open_load(url, clip, edit, rate=rate, seconds=config.seconds)
    opened = {**summary(seen), "overtaken": overtaken(seen)}
    return {f"closed, {config.clients} clients": closed, f"open, {rate:.3g} requests a second": opened}


def _report(config: Load, edit: EditConfig, figures: list[Figure], loads: dict[str, dict[str, Any]]) -> int:
    what = f"load on {config.url or config.preset}: {edit.steps} DDIM steps, guidance {edit.guidance_scale}"
    print(header(what))
    if figures:
        print("\n### against the same edits in this process\n\n| figure | measured | goal | met |\n|---|---:|---|---|")
        print("\n".join(map(str, figures)))
    for name, found in loads.items():
        print(f"\n### {name}, {config.seconds:g} s\n")
        print("\n".join(f"- {key}: {_shown(value)}" for key, value in found.items()))
    content = {
        "what": what,
        "command": " ".join(sys.argv),
        "machine": machine(),
        "against this process": [vars(figure) for figure in figures],
        "loads": loads,
    }
    write_json(config.out, content)
    print(f"\n{config.out}")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(command.run("load", lambda arguments: main(tyro.cli(Load, args=arguments))))
