"""What cheaper edits save and lose: `python benchmarks/frontier.py --help`.

Each combination of steps, solver, guidance and reuse interval edits the package's clips from their kept inversions, in
turn with the exact edit, and is compared with it frame by frame. `--held-out` takes other prompts, which no choice of a
preset may look at. Times are the process's own seconds, of all its threads, so that others on the machine count little.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from common import header, machine
from crossings import DEMO, EDITS, Source, exported, scores, sources, tuned

from tav_opt import command, editing
from tav_opt.config import PRESETS, EditConfig, SolverName
from tav_opt.demo import world
from tav_opt.demo.judge import Judge
from tav_opt.demo.vae import psnr
from tav_opt.engines import Engine
from tav_opt.engines.registry import load
from tav_opt.export.reusable import REUSABLE
from tav_opt.files import write_json

HELD_OUT: dict[str, tuple[dict[str, str], ...]] = {
    "leopard": ({"subject": "zebra"}, {"place": "meadow"}, {"style": "watercolour"}),
    "rabbit": ({"subject": "dog"}, {"place": "beach"}, {"style": "sketch"}),
    "horse": ({"subject": "cow"}, {"place": "night"}, {"style": "pixel"}),
    "chick": ({"subject": "cat"}, {"place": "forest"}, {"style": "grey"}),
}
COLUMNS = ("times as fast", "PSNR", "least PSNR", "right frames", "track", "unrest around")
HEAD = f"| settings | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}"


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Combinations of cheaper settings, or the presets, beside the exact edit."""

    presets: bool = False
    """Only these, not all combinations."""
    steps: tuple[int, ...] = (25, 20, 15, 12, 10, 8)
    solvers: tuple[SolverName, ...] = ("ddim", "dpm++", "unipc")
    intervals: tuple[int, ...] = (1, 3, 4)
    reuse: tuple[int, ...] = (1, 2, 3)
    held_out: bool = False
    clips: tuple[str, ...] = tuple(EDITS)
    edits: int = 6
    """Of each clip, the first ones."""
    eager: bool = False
    """In eager PyTorch, not by the best engine of exported clips."""
    bfloat16: bool = False
    """Each also by eager PyTorch in bfloat16, for processors that compute in it."""
    folder: Path = Path("demo-out/quality")
    """Of the tuned clips, as in quality.py."""
    out: Path = Path("benchmarks/results/frontier.json")


def main(config: Frontier) -> int:
    """Measures, prints and keeps; returns the exit status."""
    judge, rows = Judge.open(), dict[str, list[dict[str, float]]]()
    for source in sources():
        if source.name in config.clips:
            engines = _engines(source, config)
            for change in (HELD_OUT if config.held_out else EDITS)[source.name][: config.edits]:
                for name, found in _measured(engines, judge, source, change, config).items():
                    rows.setdefault(name, []).append(found)
                print(f"{source.name}: {world.prompt(source.edited(change))}", flush=True)
    means = {name: _mean(found) for name, found in rows.items()}
    what = f"{len(next(iter(rows.values())))} edits of {'held-out' if config.held_out else 'known'} prompts"
    print(f"{header(what)}\n\n{HEAD}")
    for name, mean in means.items():
        print(f"| {name} | {' | '.join(f'{mean[column]:.3g}' for column in COLUMNS)} |")
    write_json(config.out, {"command": " ".join(sys.argv), "machine": machine(), "means": means, "edits": rows})
    return 0


def _engines(source: Source, config: Frontier) -> dict[str, Engine]:
    """Eager PyTorch, or the best engine there is here, of the clip as the demo tunes and exports it; by what is added
    to the settings' names."""
    checkpoint = tuned(source, config.folder / source.name)
    own = load(checkpoint if config.eager else exported(source, config.folder, further=REUSABLE))
    return {"": own} | ({", bfloat16": load(checkpoint, dtype=torch.bfloat16)} if config.bfloat16 else {})


def _settings(config: Frontier) -> Iterator[tuple[str, EditConfig]]:
    exact = DEMO.edit_config("")
    yield "exact", exact
    if config.presets:
        yield from ((name, replace(exact, **settings)) for name, settings in PRESETS.items() if settings)
        return
    for steps, solver, interval, reuse in itertools.product(
        config.steps, config.solvers, config.intervals, config.reuse
    ):
        name = f"{steps} steps, {solver}, guidance 1 of {interval}, whole network 1 of {reuse}"
        yield name, replace(exact, steps=steps, solver=solver, guidance_interval=interval, reuse_interval=reuse)


def _measured(
    engines: dict[str, Engine], judge: Judge, source: Source, change: dict[str, str], config: Frontier
) -> dict[str, dict[str, float]]:
    prompt, found, exact, whole = world.prompt(source.edited(change)), dict[str, dict[str, float]](), None, 0.0
    for (more, engine), (name, settings) in itertools.product(engines.items(), [*_settings(config)]):
        began = time.process_time()
        frames = editing.edit(engine, replace(settings, prompts=(prompt,)))[0]
        seconds = time.process_time() - began
        exact, whole = (frames, seconds) if exact is None else (exact, whole)
        costs = {"times as fast": whole / seconds, "PSNR": psnr(exact, frames)}
        found[name + more] = costs | scores(judge, frames, source, change)
    return found


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    """Of all edits; the median of what is a matter of time."""
    mean = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    faster = float(np.median([one["times as fast"] for one in found]))
    return mean | {"times as fast": faster, "least PSNR": min(one["PSNR"] for one in found)}


if __name__ == "__main__":
    sys.exit(
        command.run(
            "benchmarks/frontier.py",
            lambda arguments: main(tyro.cli(Frontier, prog="benchmarks/frontier.py", args=arguments)),
        )
    )
