"""A clip tuned at random on the reference's small model, and exported once for all tests that need it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from filelock import FileLock

from tav_opt import checkpoint, ddim, models
from tav_opt.base.directory import Base
from tav_opt.checkpoint import Checkpoint
from tav_opt.config import EngineChoice, TrainConfig
from tav_opt.contract import ClipInfo
from tav_opt.engines import registry
from tav_opt.engines.exported import ExportedBase
from tav_opt.export import exporting, graphs, half
from tav_opt.repository import specs
from tav_opt.repository.layout import info_of
from tav_opt.unet import clip_value_names, inflate

FRAMES, SIDE, STEPS = 4, 64, 4


@dataclass(frozen=True)
class Exported:
    """Where the checkpoint and the repository with its clip `first` are, and what was reported of each graph."""

    checkpoint: Path
    repository: Path
    parity: dict[str, float]
    frames: np.ndarray

    def places(self) -> dict[str, Path]:
        return {"checkpoint": self.checkpoint, "repository": self.repository}

    @property
    def version(self) -> Path:
        return self.repository / "tune_a_video_stream" / "1"

    @property
    def base(self) -> Path:
        return next((self.version / "base").iterdir())


def tuned(base: Path, frames: np.ndarray, seed: int) -> Checkpoint:
    """A clip whose own values are off the model's by seeded noise."""
    sd = models.load(base)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(sd.unet.named_parameters())
    values = {
        name: parameters[name] + 0.05 * torch.randn(parameters[name].shape, generator=generator)
        for name in clip_value_names(sd.unet, TrainConfig.trainable)
    }
    models.put_values(sd.unet, values)
    latents = models.encode_video(sd, frames)

    info = ClipInfo(
        base=str(base),
        base_hash=Base.at(base).hash,
        prompt="a panda is skiing",
        frames=len(frames),
        height=frames.shape[1],
        width=frames.shape[2],
        fps=8.0,
        inversion_steps=STEPS,
    )
    inverted = ddim.invert(sd.predict, latents, models.encode_prompt(sd, [""]), sd.schedule, STEPS)
    return Checkpoint(info=info, values=values, source_latents=latents, inverted_latents=inverted)


def other_values(like: Checkpoint) -> Checkpoint:
    """A second clip on the same base and size, without loading a model."""
    return replace(like, values={name: value + 0.03 for name, value in like.values.items()})


def write_other(like: Exported, folder: Path) -> Path:
    """The checkpoint of that second clip, as `other` in a folder."""
    checkpoint.save(other_values(checkpoint.load(like.checkpoint)), folder / "other", settings={})
    return folder / "other"


def untuned_graph(image: UNet2DConditionModel, latent_shape: Sequence[int]) -> graphs.Graph:
    """An inflated UNet for latents (c, f, h, w) with Stable Diffusion's 77 tokens and 1000 timesteps."""
    unet = inflate(image).eval().requires_grad_(False)
    parameters = dict(unet.named_parameters())
    values = {name: parameters[name] for name in clip_value_names(unet, TrainConfig.trainable)}
    return graphs.unet_graph(unet, values, latent_shape, 77, 1000)


def half_unet(like: Exported, folder: Path) -> Path:
    """The small model's UNet in fp16."""
    names = specs.value_inputs(like.base).values()
    return half.write(like.base / "unet.onnx", folder / "unet.half.onnx", set(names))


def open_base(like: Exported, engine: EngineChoice = "auto", *, threads: int | None = None) -> ExportedBase:
    """The base of the clip `first`, on the processor."""
    info = info_of(like.version / "clips" / "first")
    choice = registry.choose(like.base, info, torch.device("cpu"), engine)
    return registry.open_base(like.base, info, choice, threads=threads)


def export_once(golden: Path, temporary: Path) -> Exported:
    """The tests' one export, as the caller's own: nobody finds what others' tests added or took away."""
    found = _export(golden, common(temporary))
    own = Path(tempfile.mkdtemp(dir=temporary))
    places = {name: shutil.copytree(place, own / place.name) for name, place in found.places().items()}
    return replace(found, **places)


def common(temporary: Path) -> Path:
    """The folder of what the test runs that go side by side (Makefile) make once for all of them."""
    return Path(os.environ.get("TAV_OPT_TESTS_COMMON", temporary))


@cache
def shallow_base(golden: Path, folder: Path) -> Path:
    """The reference's small model with a UNet of two blocks of the four, of random values: what is compared with
    itself alone is traced, compiled and run in a third of the time."""
    base, theirs = folder / "sd", golden / "reference_checkpoint" / "sd"
    with FileLock(folder / "sd.lock"):
        if (base / "unet").exists():
            return base
        shutil.copytree(theirs, base, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("unet"))
        base.chmod(0o755)  # theirs may be read alone
        config = UNet2DConditionModel.load_config(theirs / "unet")
        outer = ("block_out_channels", "down_block_types", "up_block_types")
        kinds = {key: [config[key][0], config[key][-1]] for key in outer}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            UNet2DConditionModel.from_config(config | kinds).save_pretrained(base / "unet")
    return base


@cache
def _export(golden: Path, folder: Path) -> Exported:
    clip, repository, parity = folder / "First Clip", folder / "repository", folder / "parity.json"
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    base = shallow_base(golden, folder)
    with FileLock(folder / "exported.lock"):
        if not parity.exists():
            errors: dict[str, float] = {}
            checkpoint.save(tuned(base, frames, seed=1), clip, settings={})
            exporting.export(
                clip, repository, name="first", on_graph=lambda name, found: errors.update({name: found.error})
            )
            parity.write_text(json.dumps(errors))
    return Exported(clip, repository, json.loads(parity.read_text()), frames)
