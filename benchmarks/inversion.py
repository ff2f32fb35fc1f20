"""How well DDIM inversion returns: `python benchmarks/inversion.py ckpt/`, or `sd15`.

The clip is inverted under the empty prompt, then sampled under it without guidance: exact arithmetic in infinitely many
steps would give the clip back (paper section 3.3). With iterations a step asks the network more than once. Then the
clip is edited to its own caption at a guidance of 7.5, which is what direct inversion undoes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from common import header, machine
from presets import PRESETS, prepare
from tyro.conf import Positional

from tav_opt import command, ddim, editing, inversion
from tav_opt.config import Count, EditConfig, InversionConfig, Iterations, Side
from tav_opt.demo.vae import psnr
from tav_opt.engines.pytorch import TorchEngine, open_checkpoint
from tav_opt.files import read_json, write_json

GUIDED: tuple[dict[str, Any], ...] = (
    {},
    {"inversion_iterations": 5},
    {"replace_cross": 1.0, "replace_self": 1.0, "direct_inversion": True},
    {"keep": "background"},
)
"""What an edit to the clip's own caption is told."""
SCALE = 7.5


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """Invert a tuned clip and sample it back, for several numbers of steps and of iterations."""

    checkpoint: Positional[str]
    """Folder that `tav-opt tune` wrote; `sd15`: Stable Diffusion 1.5's shape, random weights, a clip of noise."""
    steps: tuple[int, ...] = (10, 20, 50)
    iterations: tuple[Iterations, ...] = (0, 5)
    """Refinements of each step of inversion at most."""
    guided_steps: tuple[int, ...] = (20,)
    """Of the edits to the clip's own caption; none: no such edits."""
    frames: Count = 2
    """Of sd15's clip."""
    size: Side = 128
    """Of sd15's clip, in pixels."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = Path("benchmarks/results/inversion.json")


def main(config: Inversion) -> int:
    """Prints, per number of steps, the error of the latents and of the decoded frames; writes them by the model."""
    with TemporaryDirectory() as made:
        folder = prepare(config.checkpoint, Path(made), frames=config.frames, size=config.size, steps=1)
        engine = open_checkpoint(folder, device=config.device)
        rows = [
            _there_and_back(engine, InversionConfig(steps=steps, iterations=iterations))
            for steps in config.steps
            for iterations in config.iterations
        ]
        guided = [_guided(engine, steps, settings) for steps in config.guided_steps for settings in GUIDED]
    info, name = engine.info, config.checkpoint if config.checkpoint in PRESETS else "tuned"
    print(header(f"inversion and back: {info.frames} frames of {info.width}×{info.height}, tuned on {info.prompt!r}"))
    _print(rows)
    _print(guided)
    found: Mapping[str, Any] = read_json(config.out) if config.out.is_file() else {}
    content = {"command": " ".join(sys.argv), "machine": machine(), "rows": rows, "guided": guided}
    write_json(config.out, {**found, name: content})
    return 0


def _print(rows: list[dict[str, Any]]) -> None:
    """A table; seconds are the process's own, of all its threads."""
    for number, row in enumerate(rows):
        if not number:
            print(f"\n| {' | '.join(row)} |\n|{'---:|' * len(row)}")
        print(
            "| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()) + " |", flush=True
        )


def _there_and_back(engine: TorchEngine, config: InversionConfig) -> dict[str, Any]:
    """Root mean square of the error over that of the latents, and PSNR against the VAE's own frames."""
    source, empty = engine.source_latents, engine.encode_text([""])
    calls, began = 0, time.process_time()

    def predict(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return engine.predict(*given)

    noise = inversion.invert(predict, source, empty, engine.schedule, config)
    seconds = time.process_time() - began
    back = ddim.sample(engine.predict, noise, empty, engine.schedule, config.steps)
    error = float((back - source).square().mean().sqrt() / source.square().mean().sqrt())
    told = {"steps": config.steps, "iterations": config.iterations, "calls": calls, "seconds": seconds}
    found = told | {"error": error, "psnr": psnr(engine.decode(source)[0], engine.decode(back)[0])}
    print(found, flush=True)
    return found


def _guided(engine: TorchEngine, steps: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """PSNR of an edit to the caption against the VAE's own frames of the source."""
    prompt = engine.info.prompt
    asked = EditConfig(prompts=(prompt,), steps=steps, inversion_steps=steps, guidance_scale=SCALE, **settings)
    frames, expected = editing.edit(engine, asked), engine.decode(engine.source_latents)
    equal = np.array_equal(frames, expected)
    told = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items()) or "none"
    return {
        "steps": steps,
        "settings": told,
        "psnr": None if equal else psnr(expected[0], frames[0]),
        "bit for bit": equal,
    }


if __name__ == "__main__":
    sys.exit(command.run("inversion", lambda arguments: main(tyro.cli(Inversion, args=arguments))))
