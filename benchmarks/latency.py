"""Latency of every stage of an edit, engine by engine: `python benchmarks/latency.py --help`.

Parity comes first: an engine whose frames differ from eager PyTorch's is not timed, and the exit status is 1. All are
open at once, and take turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from common import Timing, header, in_turn, save, table
from presets import prepare

from tav_opt import command, ddim, editing
from tav_opt.config import EditConfig
from tav_opt.engines import Engine
from tav_opt.engines.pytorch import TorchEngine, open_checkpoint

MEAN_TOLERANCE, MAX_TOLERANCE = 0.05, 2  # of 255: what the served result may differ from `tav-opt edit`
HALF_TOLERANCES = 1, 16  # of fp16 engines
Timed = Literal["pytorch", "onnxruntime", "compiled", "server", "tensorrt", "tensorrt-rtx"]
Stage = tuple[str, Callable[[], Any], int]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time the stages of an edit: text, VAE encode, one UNet step for b = 1 and 2, inversion, sampling, VAE decode."""

    preset: str = "demo"
    """demo, sd15 (random weights), or a checkpoint's folder."""
    engines: tuple[Timed, ...] = ("pytorch", "onnxruntime", "compiled", "server")
    """compiled: programs made here by AOTInductor. server: the request end to end, by gRPC to a Triton
    server started here on the exported clip. tensorrt, tensorrt-rtx: engines built here for this machine's GPU; no GPU
    has run them so far."""
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
    quality: dict[str, Any] = {}
    stages: dict[str, list[Stage]] = {}
    with ExitStack() as opened:
        for name in config.engines:
            edit, stages[name] = opened.enter_context(_opened(name, eager, ckpt, repository, config))
            difference = np.abs(edit(short).astype(int) - expected)
            quality[name] = {"mean": float(difference.mean()), "max": int(difference.max())}
            mean, most = HALF_TOLERANCES if _in_half(name) else (MEAN_TOLERANCE, MAX_TOLERANCE)
            if difference.mean() > mean or difference.max() > most:
                print(f"{name}: its frames are wrong by {quality[name]} of 255: not timed", file=sys.stderr)
                return 1
        results = _timings(stages)
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


def _in_half(name: Timed) -> bool:
    return name.startswith("tensorrt") or (name == "compiled" and torch.cuda.is_available())


def _timings(stages: dict[str, list[Stage]]) -> dict[str, list[Timing]]:
    """Each stage by all engines that have it, in turn."""
    results: dict[str, list[Timing]] = {name: [] for name in stages}
    for stage, calls in {stage: calls for found in stages.values() for stage, _, calls in found}.items():
        runs = {name: call for name, found in stages.items() for own, call, _ in found if own == stage}
        for name, timing in in_turn(stage, runs, calls=calls).items():
            results[name].append(timing)
    return results


@contextmanager
def _opened(
    name: Timed, eager: TorchEngine, ckpt: Path, repository: Path, config: Latency
) -> Iterator[tuple[Callable[[EditConfig], np.ndarray], list[Stage]]]:
    """How an engine edits, and its stages."""
    if name == "pytorch":
        yield lambda edit: editing.edit(eager, edit), _stages(eager, config)
        return
    from tav_opt.export.exporting import export

    clip = export(ckpt, repository, name="benchmark")
    if name != "server":
        engine = _built(name, clip, repository, config.refit)
        yield lambda edit: editing.edit(engine, edit), _stages(engine, config)
        return
    from tav_opt.client import Client
    from tav_opt.serving.host.serve_config import ServeConfig
    from tav_opt.serving.host.server import Server

    free = ServeConfig(repository=repository, grpc_port=0, http_port=0, metrics_port=0)
    with Server(free) as server, Client(server.grpc_url) as client:
        request = _edit(eager, steps=config.steps)
        few = max(1, config.calls // 3)
        stage = ("request end to end (kept inversion)", lambda: client.edit(clip.name, request), few)
        yield lambda edit: client.edit(clip.name, edit).frames, [stage]


def _built(name: Timed, clip: Path, repository: Path, refit: bool) -> Engine:
    """The exported clip by an engine, what that needs built first: for this machine's processor, or its GPU."""
    from tav_opt.engines.registry import open_clip

    if name == "compiled":
        from tav_opt.export import compiled

        compiled.export(clip)
        return open_clip(repository, clip.name, engine="compiled")
    if name == "onnxruntime":
        return open_clip(repository, clip.name, engine="onnxruntime")
    from tav_opt.export.tensorrt import build

    build.export(build.plan(build.EngineConfig(target=name, refit=refit)), clip, say=print)
    return open_clip(repository, clip.name, engine="tensorrt")


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
    sys.exit(command.run("latency", lambda arguments: main(tyro.cli(Latency, args=arguments))))
