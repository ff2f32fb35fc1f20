"""Convolutions whose channels come first or last, with the demo's model: `python benchmarks/memory_format.py --help`.

Both layouts take turns. Their noise is compared first; times are of the process, which what else the machine does
disturbs less than it does the clock's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import header, machine
from presets import DEMO_MODEL
from torch import Tensor

from tav_opt import command, models
from tav_opt.config import TrainConfig
from tav_opt.files import write_json
from tav_opt.models import StableDiffusion
from tav_opt.tuning_step import begin, seeded_draw, train_step

FIRST, LAST = "channels first", "channels last"
FRAMES = 24
TOLERANCE = 1e-4
"""Of the noise, over its largest value."""


@dataclass(frozen=True, kw_only=True)
class MemoryFormat:
    """Process seconds of a guided step, a tuning step, the VAE's encoding and decoding, in both layouts."""

    calls: int = 10
    out: Path = Path("benchmarks/results/memory_format.json")


def laid_out(sd: StableDiffusion, memory_format: torch.memory_format) -> StableDiffusion:
    """A copy of the model."""
    copy = deepcopy(sd)
    for part in (copy.unet, copy.vae):
        part.to(memory_format=memory_format)
    return copy


def stages(sd: StableDiffusion) -> dict[str, Callable[[], Any]]:
    """What is timed, on one model; each returns what is compared, or nothing."""
    side, text = sd.unet.config.sample_size, models.encode_prompt(sd, ["a cat", ""])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, sd.unet.config.in_channels, FRAMES, side, side, generator=generator)
    pixels = np.random.default_rng(0).integers(0, 255, (FRAMES, *2 * [side * sd.vae_factor], 3), dtype=np.uint8)
    config = TrainConfig(steps=10**6)
    trained = deepcopy(sd.unet)
    training, draw = begin(trained, config), seeded_draw(0, latents, sd.schedule)

    def guided_step() -> Tensor:
        return sd.predict(latents.expand(2, -1, -1, -1, -1), 501, text)

    def tuning_step() -> None:
        train_step(training, trained, latents, text[:1], sd.schedule, config, draw)

    return {
        "guided step": guided_step,
        "tuning step": tuning_step,
        "VAE, encode": lambda: models.encode_video(sd, pixels),
        "VAE, decode": lambda: torch.from_numpy(models.decode_video(sd, latents)).float(),
    }


def process_seconds(runs: dict[str, Callable[[], Any]], calls: int) -> dict[str, float]:
    """Medians of runs that take turns, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + calls):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def main(config: MemoryFormat) -> int:
    """Compares, times, prints and saves; returns the exit status."""
    sd = models.load(DEMO_MODEL)
    by_layout = {
        FIRST: stages(laid_out(sd, torch.contiguous_format)),
        LAST: stages(laid_out(sd, torch.channels_last)),
    }
    first, last = (found["guided step"]() for found in by_layout.values())
    error = float((first - last).abs().max() / first.abs().max())
    print(header(f"convolutions' layout, {FRAMES} frames of the demo's model; noise differs by {error:.1e}"))
    if error > TOLERANCE:
        return 1
    print(f"\n| process seconds | {FIRST} | {LAST} | times as fast |\n|---|---:|---:|---:|")
    found = {}
    for stage in by_layout[FIRST]:
        times = process_seconds({layout: runs[stage] for layout, runs in by_layout.items()}, config.calls)
        print(f"| {stage} | {times[FIRST]:.3f} | {times[LAST]:.3f} | {times[FIRST] / times[LAST]:.2f} |", flush=True)
        found[stage] = times
    what = {"command": " ".join(sys.argv), "machine": machine(), "error": error, "process_seconds": found}
    write_json(config.out, what)
    return 0


if __name__ == "__main__":
    sys.exit(command.run("memory_format", lambda arguments: main(tyro.cli(MemoryFormat, args=arguments))))
