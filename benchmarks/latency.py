"""Latency of every stage of an edit, engine by engine: `python benchmarks/latency.py --help`.

Parity comes first: an engine whose frames differ from eager PyTorch's is not timed, and the exit status is 1.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from common import Timing, header, save, table, timed
from presets import prepare

from tav_opt import command, ddim, editing
from tav_opt.config import EditConfig
from tav_opt.engines import Engine
from tav_opt.engines.pytorch import TorchEngine, open_checkpoint

MEAN_TOLERANCE, MAX_TOLERANCE = 0.05, 2  # of 255: what the served result may differ from `tav-opt edit`
HALF_TOLERANCES = 1, 16  # of fp16 engines
EngineName = Literal["pytorch", "onnxruntime", "server", "tensorrt", "tensorrt-rtx"]
Stage = tuple[str, Callable[[], Any], int]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time the stages of an edit: text, VAE encode, one UNet step for b = 1 and 2, inversion, sampling, VAE decode."""

    preset: str = "demo"
    """demo, sd15 (random weights), or a checkpoint's folder."""
    engines: tuple[EngineName, ...] = ("pytorch", "onnxruntime", "server")
    """server: the request end to end, by gRPC to a Triton server started here on the exported clip. tensorrt,
    tensorrt-rtx: engines built here for this machine's GPU; no GPU has run them so far."""
    refit: bool = False
    """TensorRT's engines hold the clip's values as weights to refit."""
    frames: int = 24
    size: int | None = None
    """Pixels of a side; default: the model's own."""
    steps: int = 50
    """DDIM steps of inversion and of sampling."""
    calls: int = 10
    """Calls of each single stage; whole inversions, samplings and requests are called a third as often."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Of the PyTorch engine."""
    out: Path = Path("benchmarks/results/latency.json")


def main(config: Latency) -> int:
    """Prepares, checks parity, times and prints; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        ckpt = prepare(config.preset, Path(folder), frames=config.frames, size=config.size, steps=config.steps)
        return measure(config, ckpt, Path(folder) / "repository")


def measure(config: Latency, ckpt: Path, repository: Path) -> int:
    """Times the engines on a checkpoint, exported into `repository`; returns the exit status."""
    eager = open_checkpoint(ckpt, device=config.device)
    short = _edit(eager, steps=2)
    expected = editing.edit(eager, short)
    results: dict[str, list[Timing]] = {}
    quality: dict[str, Any] = {}
    for name in config.engines:
        with _opened(name, eager, ckpt, repository, config) as (edit, stages):
            difference = np.abs(edit(short).astype(int) - expected)
            quality[name] = {"mean": float(difference.mean()), "max": int(difference.max())}
            mean, most = HALF_TOLERANCES if name.startswith("tensorrt") else (MEAN_TOLERANCE, MAX_TOLERANCE)
            if difference.mean() > mean or difference.max() > most:
                print(f"{name}: its frames are wrong by {quality[name]} of 255: not timed", file=sys.stderr)
                return 1
            results[name] = [timed(stage, call, calls=calls) for stage, call, calls in stages]
    info = eager.info
    what = f"latency of {config.preset}: {info.frames} frames of {info.width}×{info.height}, {config.steps} DDIM steps"
    print(header(what))
    for name, timings in results.items():
        found = quality[name]
        print(f"\n{table(name, timings)}")
        print(f"\nagainst eager frames: {found['mean']:.4f} in the mean, {found['max']} at most, of 255")
    save(config.out, {"what": what, "command": " ".join(sys.argv)}, results, quality)
    print(f"\n{config.out}")
    return 0


@contextmanager
def _opened(
    name: EngineName, eager: TorchEngine, ckpt: Path, repository: Path, config: Latency
) -> Iterator[tuple[Callable[[EditConfig], np.ndarray], list[Stage]]]:
    """How an engine edits, and its stages."""
    if name == "pytorch":
        yield lambda edit: editing.edit(eager, edit), _stages(eager, config)
        return
    from tav_opt.export.repository import export

    clip = export(ckpt, repository, name="benchmark")
    if name == "onnxruntime":
        from tav_opt.engines.onnxruntime import open_clip

        engine = open_clip(repository, clip.name)
        yield lambda edit: editing.edit(engine, edit), _stages(engine, config)
        return
    if name in ("tensorrt", "tensorrt-rtx"):
        fast = _tensorrt(name, clip, repository, config.refit)
        yield lambda edit: editing.edit(fast, edit), _stages(fast, config)
        return
    from tav_opt.client import Client
    from tav_opt.serving.server import ServeConfig, Server

    free = ServeConfig(repository=repository, grpc_port=0, http_port=0, metrics_port=0)
    with Server(free) as server, Client(server.grpc_url) as client:
        request = _edit(eager, steps=config.steps)
        few = max(1, config.calls // 3)
        stage = ("request end to end (kept inversion)", lambda: client.edit(clip.name, request), few)
        yield lambda edit: client.edit(clip.name, edit).frames, [stage]


def _tensorrt(target: Literal["tensorrt", "tensorrt-rtx"], clip: Path, repository: Path, refit: bool) -> Engine:
    """Engines for this machine's GPU, built first."""
    from tav_opt.engines.tensorrt import open_clip
    from tav_opt.export import tensorrt

    tensorrt.export(tensorrt.plan(tensorrt.EngineConfig(target=target, refit=refit)), clip, say=print)
    return open_clip(repository, clip.name, target=target)


def _edit(engine: Engine, *, steps: int) -> EditConfig:
    return EditConfig(
        prompts=("a red thing",), steps=steps, inversion_steps=engine.info.inversion_steps, guidance_scale=7.5
    )


def _stages(engine: Engine, config: Latency) -> list[Stage]:
    """Every stage with how often it is called."""
    text = engine.encode_text(["", "a red thing"])
    one = engine.inverted_latents
    two = torch.cat([one, one])
    frames = engine.decode(one)[0]
    few, steps, schedule = max(1, config.calls // 3), config.steps, engine.schedule

    def sample() -> torch.Tensor:
        unconditional, conditional = text[:1], text[1:]
        return ddim.sample(
            engine.predict, one, conditional, schedule, steps, unconditional=unconditional, guidance_scale=7.5
        )

    return [
        ("text, 2 prompts", lambda: engine.encode_text(["", "a red thing"]), config.calls),
        (f"VAE encode, {len(frames)} frames", lambda: engine.encode_video(frames), config.calls),
        ("UNet step, b = 1", lambda: engine.predict(one, 500, text[:1]), config.calls),
        ("UNet step, b = 2", lambda: engine.predict(two, 500, text), config.calls),
        (f"inversion, {steps} steps", lambda: ddim.invert(engine.predict, one, text[:1], schedule, steps), few),
        (f"guided sampling, {steps} steps", sample, few),
        (f"VAE decode, {len(frames)} frames", lambda: engine.decode(one), config.calls),
        ("edit end to end (kept inversion)", lambda: editing.edit(engine, _edit(engine, steps=steps)), few),
    ]


if __name__ == "__main__":
    settings = tyro.cli(Latency)
    sys.exit(command.run("latency", lambda: main(settings)))
