"""Checkpoints to time: the demo's model, a random Stable Diffusion 1.5, as it is or narrow, or one that was tuned."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import sd15
import torch

from tav_opt import checkpoint, models
from tav_opt.base.directory import Base
from tav_opt.config import InputError, TrainConfig
from tav_opt.contract import ClipInfo
from tav_opt.demo.random_model import write_random_model
from tav_opt.unet import clip_value_names

PRESETS = ("demo", "sd15", "like-sd15")
DEMO_MODEL = Path(models.__file__).parent / "demo" / "model"


def prepare(preset: str, folder: Path, *, frames: int, size: int | None, steps: int) -> Path:
    """The checkpoint to time, and untuned: the same arithmetic on values that nobody trained.

    preset is `demo` (random weights until the package ships trained ones: as fast), `sd15`, `like-sd15` (its blocks at
    widths of the demo's), or a checkpoint's folder, which is taken as it is. Raises InputError for anything else.
    """
    if preset not in PRESETS:
        if not checkpoint.is_checkpoint(Path(preset)):
            raise InputError(f"preset {preset!r} is neither {', '.join(PRESETS)}, nor a checkpoint's folder")
        return Path(preset)
    if preset != "demo":
        base = random_sd15(folder / preset, kind="whole" if preset == "sd15" else "like")
    else:
        base = DEMO_MODEL if DEMO_MODEL.is_dir() else write_random_model(folder / "demo")
    return untuned(base, folder / "checkpoint", frames=frames, size=size, steps=steps)


def untuned(base: Path, folder: Path, *, frames: int, size: int | None, steps: int) -> Path:
    """A checkpoint of `base` whose clip is noise and whose temporal attention is random, so that it counts."""
    torch.manual_seed(0)
    unet = models.load_video_unet(base)
    names = clip_value_names(unet, TrainConfig().trainable)
    values = {name: value.clone() for name, value in unet.named_parameters() if name in names}
    for name, value in values.items():
        if name.endswith("attn_temp.to_out.0.weight"):
            value.normal_(std=0.02)
    model = Base.at(base)
    factor, size = model.vae_factor, size or model.native_size
    models.check_size(size, size, factor)
    latents = torch.randn(1, unet.config.in_channels, frames, size // factor, size // factor)
    info = ClipInfo(
        base=str(base.resolve()),
        base_hash=model.hash,
        prompt="a moving thing",
        frames=frames,
        height=size,
        width=size,
        fps=8.0,
        inversion_steps=steps,
    )
    made = checkpoint.Checkpoint(info=info, values=values, source_latents=latents, inverted_latents=latents.flip(-1))
    checkpoint.save(made, folder, {"untuned": True}, torch.float32)
    return folder


def random_sd15(folder: Path, *, kind: sd15.Kind = "whole") -> Path:
    """A directory with Stable Diffusion 1.5's architecture and random weights (4.3 GB on disk, as it is)."""
    made = sd15.parts(torch.device("cpu"), torch.float32, kind=kind)
    for field in fields(made):
        getattr(made, field.name).save_pretrained(folder / field.name)
    return folder
