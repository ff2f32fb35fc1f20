"""What a step that follows maps costs: by a T2I-Adapter or a ControlNet, against a plain one; they take turns.

`python benchmarks/followed.py --help`. Networks and base are random, as fast as any. An engine whose edits differ from
eager PyTorch's is not timed, and the exit status is 1. An adapter is run once an edit: its share of a step is told too.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from common import Timing, header, in_turn, machine, table
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from latency import MAX_TOLERANCE, MEAN_TOLERANCE
from presets import prepare

from tav_opt import command, editing
from tav_opt.clip_folder import ClipFolder
from tav_opt.conditions import condition
from tav_opt.config import Control, EditConfig
from tav_opt.engines import Engine
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.files import write_json

GOALS = {"adapter": 1.05, "controlnet": 1.6}
"""A step's time over a plain one's."""
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True, kw_only=True)
class Followed:
    """Time a guided step of the UNet: plain, by an adapter, by a ControlNet."""

    preset: str = "like-sd15"
    """like-sd15 (its blocks at widths of the demo's, random), sd15, or the folder of a checkpoint whose UNet has
    attention in all blocks but the last, as adapters ask."""
    engines: tuple[Literal["pytorch", "onnxruntime", "compiled"], ...] = ("pytorch", "onnxruntime")
    frames: int = 24
    size: int | None = None
    """Pixels of a side; default: the model's own."""
    calls: int = 10
    clock: Literal["wall", "processor"] = "wall"
    """processor: what this process computes, all its threads together; where the machine has other work, too."""
    out: Path = Path("benchmarks/results/followed.json")


def main(config: Followed) -> int:
    """Prepares, checks parity, times and prints; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        ckpt = prepare(config.preset, Path(folder), frames=config.frames, size=config.size, steps=2)
        places = write_networks(Path(ClipFolder.at(ckpt).info.base), Path(folder))
        return measure(config, ckpt, places, Path(folder) / "repository")


def write_networks(base: Path, folder: Path) -> dict[str, Path]:
    """A ControlNet and an adapter for a base, as diffusers saves them; all their weights are draws."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    widths = list(unet.config.block_out_channels)
    nets = {
        "controlnet": ControlNetModel.from_unet(unet),
        "adapter": T2IAdapter(3, widths, 2, 8, adapter_type="full_adapter"),
    }
    for name, net in nets.items():
        for value in net.parameters():
            if not value.any():  # a ControlNet's last convolutions, which would add nothing
                torch.nn.init.normal_(value, std=0.02)
        net.save_pretrained(folder / name)
    return {name: folder / name for name in nets}


def measure(config: Followed, ckpt: Path, places: dict[str, Path], repository: Path) -> int:
    """Times the engines on a checkpoint, exported into `repository`; returns the exit status."""
    networks: dict[str, Any] = {kind + "s": {kind: place} for kind, place in places.items()}
    eager = open_checkpoint(ckpt, **networks)
    info = eager.info
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 256, (info.frames, info.height, info.width, 3), dtype=np.uint8)
    expected = {kind: _edited(eager, kind, maps) for kind in GOALS}
    results: dict[str, dict[str, Timing]] = {}
    quality: dict[str, dict[str, float]] = {}
    for name in config.engines:
        engine = eager if name == "pytorch" else _exported(name, ckpt, repository, networks)
        apart = {kind: np.abs(_edited(engine, kind, maps).astype(int) - frames) for kind, frames in expected.items()}
        quality[name] = {kind: float(difference.mean()) for kind, difference in apart.items()}
        if any(one.mean() > MEAN_TOLERANCE or one.max() > MAX_TOLERANCE for one in apart.values()):
            print(f"{name}: its frames are wrong by {quality[name]} of 255 in the mean: not timed", file=sys.stderr)
            return 1
        results[name] = in_turn("", _steps(engine, maps), calls=config.calls, warmup=2, clock=CLOCKS[config.clock])
    size = f"{info.frames} frames of {info.width}×{info.height}"
    what = f"a guided step of {config.preset}: {size}, {config.clock} time"
    print(header(what))
    for name, found in results.items():
        _print(name, found)
    content = {"what": what, "command": " ".join(sys.argv), "machine": machine(), "goals": GOALS, "quality": quality}
    ratios = {name: _ratios(found) for name, found in results.items()}
    seconds = {name: {kind: asdict(timing) for kind, timing in found.items()} for name, found in results.items()}
    write_json(config.out, content | {"ratios": ratios, "seconds": seconds})
    print(f"\n{config.out}")
    return 0


def _exported(name: Any, ckpt: Path, repository: Path, networks: dict[str, Any]) -> Engine:
    from tav_opt.engines.registry import open_clip
    from tav_opt.export import compiled, conditions
    from tav_opt.export.exporting import export
    from tav_opt.repository.layout import base_of

    clip = export(ckpt, repository, name="benchmark", **networks)
    if name == "compiled":
        compiled.export(clip, further=conditions.further(base=base_of(clip), **networks))
    return open_clip(repository, clip.name, engine=name)


def _config(*kinds: str) -> EditConfig:
    controls = tuple(Control(name=kind) for kind in kinds)
    return EditConfig(prompts=("a red thing",), steps=2, inversion_steps=2, guidance_scale=7.5, controls=controls)


def _edited(engine: Engine, kind: str, maps: np.ndarray) -> np.ndarray:
    return editing.edit(engine, _config(kind), maps={kind: maps})


def _steps(engine: Engine, maps: np.ndarray) -> dict[str, Callable[[], Any]]:
    """A step of each kind; and the adapter's own run, which an edit has once."""
    text = engine.encode_text(["", "a red thing"])
    latents = engine.inverted_latents.expand(2, -1, -1, -1, -1)

    def step(following: list[condition.Condition]) -> torch.Tensor:
        return engine.predict(latents, 500, condition.told(following, latents, 500, text))

    followed = {kind: editing.conditions(engine, _config(kind), {kind: maps}) for kind in GOALS}
    steps: dict[str, Callable[[], Any]] = {"plain": partial(step, [])}
    steps |= {kind: partial(step, following) for kind, following in followed.items()}
    return steps | {"adapter, once an edit": lambda: editing.conditions(engine, _config("adapter"), {"adapter": maps})}


def _ratios(found: dict[str, Timing]) -> dict[str, float]:
    return {kind: found[kind].median / found["plain"].median for kind in GOALS}


def _print(name: str, found: dict[str, Timing]) -> None:
    print("\n" + table(name, [Timing(kind, *list(vars(one).values())[1:]) for kind, one in found.items()]))
    for kind, ratio in _ratios(found).items():
        goal = GOALS[kind]
        print(f"\n{kind}: {ratio:.3f} × a plain step (goal ≤ {goal}: {'met' if ratio <= goal else 'not met'})")


if __name__ == "__main__":
    sys.exit(command.run("followed", lambda arguments: main(tyro.cli(Followed, args=arguments))))
