"""How well DDIM inversion returns: `python benchmarks/inversion.py ckpt/`.

The clip is inverted under the empty prompt, then sampled under it without guidance: exact arithmetic in infinitely many
steps would give the clip back (paper section 3.3). With iterations a step asks the network more than once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import header, machine
from tyro.conf import Positional

from tav_opt import command, ddim, inversion
from tav_opt.config import InversionConfig, Iterations
from tav_opt.engines.pytorch import TorchEngine, open_checkpoint
from tav_opt.files import write_json


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """Invert a tuned clip and sample it back, for several numbers of steps and of iterations."""

    checkpoint: Positional[Path]
    """Folder that `tav-opt tune` wrote."""
    steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    iterations: tuple[Iterations, ...] = (0, 5)
    """Refinements of each step of inversion at most."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = Path("benchmarks/results/inversion.json")


def main(config: Inversion) -> int:
    """Prints, per number of steps, the error of the latents and of the decoded frames."""
    engine = open_checkpoint(config.checkpoint, device=config.device)
    decoded = engine.decode(engine.source_latents)
    rows = [
        _there_and_back(engine, decoded, InversionConfig(steps=steps, iterations=iterations))
        for iterations in config.iterations
        for steps in config.steps
    ]
    info = engine.info
    print(header(f"inversion and back: {info.frames} frames of {info.width}×{info.height}, tuned on {info.prompt!r}"))
    print("\n| steps | iterations | calls of the network | error of latents, relative | PSNR of frames dB |")
    print("|---:|---:|---:|---:|---:|")
    for row in rows:
        told = f"| {row['steps']} | {row['iterations']} | {row['calls']} "
        print(f"{told}| {row['error']:.4f} | {row['psnr']:.1f} |")
    content = {"command": " ".join(sys.argv), "machine": machine(), "rows": rows}
    write_json(config.out, content)
    return 0


def _there_and_back(engine: TorchEngine, decoded: np.ndarray, config: InversionConfig) -> dict[str, float]:
    """Root mean square of the error over that of the latents, and PSNR against the VAE's own frames."""
    source, empty = engine.source_latents, engine.encode_text([""])
    calls = 0

    def predict(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return engine.predict(*given)

    noise = inversion.invert(predict, source, empty, engine.schedule, config)
    back = ddim.sample(engine.predict, noise, empty, engine.schedule, config.steps)
    error = float((back - source).square().mean().sqrt() / source.square().mean().sqrt())
    squares = np.square(engine.decode(back).astype(np.float64) - decoded).mean()
    psnr = float(10 * np.log10(255**2 / max(squares, 1e-9)))
    return {"steps": config.steps, "iterations": config.iterations, "calls": calls, "error": error, "psnr": psnr}


if __name__ == "__main__":
    sys.exit(command.run("inversion", lambda arguments: main(tyro.cli(Inversion, args=arguments))))
