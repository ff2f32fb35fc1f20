"""The parts of a Stable Diffusion directory: video UNet, VAE, text encoder, tokenizer, schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tav_opt import checkpoint, upsampling
from tav_opt.base import configuration, weights
from tav_opt.base.directory import Base, recorded_base, resolve
from tav_opt.base.image_model import ImageModel, empty, load_strictly, load_unet
from tav_opt.base.textual_inversion import spelt_out
from tav_opt.config import BaseConfig, InputError, PathLike, texts
from tav_opt.ddim import Schedule, Text, Timestep, timestep_rows
from tav_opt.device import usable_device
from tav_opt.files import read_object
from tav_opt.unet import VideoUNet, arguments, clip_value_names, inflate
from tav_opt.video.pixels import to_frames, to_host, to_unit

Module = TypeVar("Module", bound=torch.nn.Module)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StableDiffusion:
    """The parts of one base model, its UNet inflated."""

    base: Base
    unet: VideoUNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: Schedule

    @property
    def vae_factor(self) -> int:
        """Pixels of a side to one latent (8 for Stable Diffusion)."""
        return self.base.vae_factor

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        """latents (b,c,f,h,w), text (b,tokens,width) → noise or v (b,c,f,h,w), in float32 where the UNet has halves.

        A mapping has `text` in it, and what else the UNet is to be told, by the names of `unet.arguments`;
        told of attention control it answers with one channel more, where the blend words look.
        """
        told = {"text": text} if isinstance(text, Tensor) else text
        return at_least_float32(self.unet(latents, timestep_rows(timestep, latents), **arguments(told)))

    @torch.no_grad()
    def predict_with_features(self, latents: Tensor, timestep: Timestep, text: Tensor) -> tuple[Tensor, Tensor]:
        """As `predict`, and the features (b,f,c',h,w) that came to the outermost layers; told of them as `features`,
        `predict` runs those alone."""
        noise, features = self.unet(latents, timestep_rows(timestep, latents), text, gives_features=True)
        return at_least_float32(noise), features


def at_least_float32(x: Tensor) -> Tensor:
    """In float32 at least, as the loop has its latents: what fifty steps add up is not rounded at each."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def load_video_unet(
    path_or_hub_id: PathLike, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> VideoUNet:
    """An inflated UNet from an SD 1.x/2.x model (or its `unet/`), a directory the reference saved, or our checkpoint.

    Raises InputError for UNets of another kind and for files that are missing, corrupt or unpickle code.
    """
    device = usable_device(device)
    path = resolve(path_or_hub_id)
    if checkpoint.is_checkpoint(path):
        tuned = checkpoint.load(path)
        base = recorded_base(tuned.info.base, tuned.info.additions, None, tuned.info.base_hash)
        unet = _unet_of(base, ImageModel.load(base))
        put_values(unet, tuned.values)
    else:
        folder = path / "unet" if (path / "unet").is_dir() else path
        if not (folder / "config.json").is_file():
            raise InputError(f"{path} holds no UNet: {folder / 'config.json'} does not exist")
        config = read_object(folder / "config.json")
        configuration.check_unet(config, folder / "config.json")
        unet = _unet(config, weights.files(folder))
    return placed(unet, device, dtype)


def placed(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """Frozen, on its device; channels come last in its convolutions, which was never slower where it was measured
    (benchmarks/memory_format.py)."""
    module.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module.eval().requires_grad_(False)


def _unet_of(base: Base, image: ImageModel) -> VideoUNet:
    return _unet(base.configs["unet"], base.files["unet"]) if image.unet is None else inflate(image.unet)


def _unet(config: dict[str, Any], files: list[Path]) -> VideoUNet:
    folder = files[0].parent
    if not configuration.is_reference_unet(config):
        return inflate(load_unet(config, files))
    unet = inflate(empty(UNet2DConditionModel, configuration.image_config(config), folder))
    load_strictly(unet, weights.read(files), folder)
    return unet


def put_values(unet: VideoUNet, values: dict[str, Tensor]) -> None:
    """Copies a clip's own values into the UNet.

    Raises InputError for names or shapes it does not have, and where one is missing that no image model has either.
    """
    own = dict(unet.named_parameters())
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            raise InputError(f"value {name} {tuple(value.shape)} does not fit this UNet")
        own[name].data.copy_(value)
    if missing := [name for name in clip_value_names(unet, ()) if name not in values]:
        raise InputError(f"value {missing[0]} is missing, which no image model brings")


def load(
    model: PathLike | BaseConfig | Base, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> StableDiffusion:
    """All parts of a Stable Diffusion, what is added to it fused in, the UNet inflated.

    Raises InputError for parts that are missing or corrupt.
    """
    return _loaded(Base.at(model), _unet_of, dtype, device)


def load_image(
    model: PathLike | BaseConfig | Base, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> StableDiffusion:
    """The same parts, the UNet diffusers' own as it is: it predicts images (b,c,h,w), and `predict` is not for it.

    Raises InputError, also for a UNet that the reference inflated and tuned.
    """

    def unet(base: Base, image: ImageModel) -> Any:
        if image.unet is None:
            raise InputError(f"{base.path} holds a UNet that was inflated and tuned, not one of images")
        return image.unet

    return _loaded(Base.at(model), unet, dtype, device)


def _loaded(
    base: Base,
    unet: Callable[[Base, ImageModel], VideoUNet],
    dtype: torch.dtype,
    device: str | torch.device,
) -> StableDiffusion:
    device = usable_device(device)
    halves = [f"{part}/{file.name}" for part, files in base.files.items() for file in files[:1]]
    if halves := [name for name in halves if weights.is_half(name)]:
        _log.warning("model %s has weights of half precision only: %s", base.path, ", ".join(halves))
    image = ImageModel.load(base)
    upsampling.fuse(image.vae)
    return StableDiffusion(
        base=base,
        unet=placed(unet(base, image), device, dtype),
        vae=placed(image.vae, device, dtype),
        text_encoder=image.text_encoder.to(device, dtype).eval().requires_grad_(False),
        tokenizer=image.tokenizer,
        schedule=Schedule.from_config(base.configs["scheduler"]),
    )


def tokenize(tokenizer: CLIPTokenizer, prompts: str | Sequence[str]) -> Tensor:
    """Prompts → token ids (prompts, tokens), padded; raises InputError naming words beyond the length."""
    prompts = [spelt_out(tokenizer.backend_tokenizer, prompt) for prompt in texts("prompts", prompts)]
    length = tokenizer.model_max_length
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False).input_ids
        if len(ids) > length:
            beyond = tokenizer.decode(ids[length - 1 : -1], skip_special_tokens=True).strip()
            raise InputError(f"prompt is {len(ids)} tokens long, {length} at most; too much: {beyond!r}")
    batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids


@torch.no_grad()
def encode_prompt(sd: StableDiffusion, prompts: str | Sequence[str]) -> Tensor:
    """Prompts → text (prompts, tokens, width), the text encoder's last hidden state."""
    ids = tokenize(sd.tokenizer, prompts).to(sd.text_encoder.device)
    return sd.text_encoder(ids)[0]


@torch.no_grad()
def encode_video(
    sd: StableDiffusion, frames: np.ndarray, *, batch: int = 8, generator: torch.Generator | None = None
) -> Tensor:
    """uint8 frames (f, H, W, 3) → scaled latents (1, c, f, h, w) in float32 at least, `batch` frames at a time.

    The mean of the VAE's posterior; with a generator, a sample of it as the reference takes. Raises InputError when
    the size is not a multiple of the VAE's factor.
    """
    check_size(frames.shape[1], frames.shape[2], sd.vae_factor)
    parts = [to_unit(frames[first : first + batch]) for first in range(0, len(frames), batch)]
    posteriors = [sd.vae.encode(part.to(sd.vae.device, sd.vae.dtype)).latent_dist for part in parts]
    latents = torch.cat([p.mean if generator is None else p.sample(generator) for p in posteriors])
    return (at_least_float32(latents) * sd.vae.config.scaling_factor).transpose(0, 1)[None]  # f c h w → 1 c f h w


@torch.no_grad()
def decode_video(sd: StableDiffusion, latents: Tensor, *, batch: int = 8) -> np.ndarray:
    """Scaled latents (b, c, f, h, w) → uint8 frames (b, f, H, W, 3), `batch` frames at a time."""
    images = latents.transpose(1, 2).flatten(0, 1) / sd.vae.config.scaling_factor  # (b f) c h w
    frames = torch.cat([to_frames(sd.vae.decode(part).sample) for part in images.to(sd.vae.dtype).split(batch)])
    return to_host(frames).reshape(latents.shape[0], latents.shape[2], *frames.shape[1:])


def check_size(height: int, width: int, factor: int) -> None:
    """Raises InputError unless both sides are multiples of the VAE's factor."""
    if height < factor or width < factor or height % factor or width % factor:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise InputError(
            f"size {width}×{height} is not a multiple of {factor} (the VAE's factor): e.g. {near[1]}×{near[0]}"
        )
