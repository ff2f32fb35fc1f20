"""Directories that the reference implementation saved, given the clip and caption that they lack."""

from __future__ import annotations

from pathlib import Path

from tav_opt import inversion, models, video
from tav_opt.base import configuration
from tav_opt.checkpoint import Checkpoint
from tav_opt.config import ClipConfig, InputError, InversionConfig, TrainConfig
from tav_opt.contract import ClipInfo
from tav_opt.engines.pytorch import TorchEngine
from tav_opt.files import read_object
from tav_opt.unet import clip_value_names


def is_reference(folder: Path) -> bool:
    """Whether the reference implementation saved this directory after tuning."""
    config = folder / "unet" / "config.json"
    return config.is_file() and configuration.is_reference_unet(read_object(config))


def read(folder: Path, source: ClipConfig, prompt: str, inverting: InversionConfig) -> Checkpoint:
    """The tuned clip in such a directory, which serves as its own base; inverts `source` under the empty prompt.

    Raises InputError for a clip that cannot be read or does not fit, and for an empty prompt.
    """
    if not prompt.strip():
        raise InputError("prompt '' is empty: give the caption that the model was tuned on")
    sd = models.load(folder)
    models.check_size(source.height, source.width, sd.vae_factor)
    clip = video.read(source)
    info = ClipInfo(
        base=str(folder.resolve()),
        base_hash=sd.base.hash,
        prompt=prompt,
        frames=source.frames,
        height=source.height,
        width=source.width,
        fps=clip.fps,
        inversion_steps=inverting.steps,
        inversion_iterations=inverting.iterations,
    )
    latents = models.encode_video(sd, clip.frames)
    engine = TorchEngine(sd=sd, info=info, source_latents=latents, inverted_latents=latents)
    inverted = inversion.invert(engine.predict, latents, engine.encode_text([""]), sd.schedule, inverting)
    parameters = dict(sd.unet.named_parameters())
    return Checkpoint(
        info=info,
        values={name: parameters[name].detach() for name in clip_value_names(sd.unet, TrainConfig.trainable)},
        source_latents=latents,
        inverted_latents=inverted,
        sound=clip.sound,
    )
