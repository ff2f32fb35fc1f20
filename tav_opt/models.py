"""The parts of a Stable Diffusion directory: video UNet, VAE, text encoder, tokenizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from tav_opt import checkpoint
from tav_opt.config import InputError
from tav_opt.ddim import Schedule
from tav_opt.files import read_json
from tav_opt.pixels import to_frames, to_unit
from tav_opt.unet import VideoUNet, inflate

diffusers_logging.set_verbosity_error()  # configurations of 2022 hold entries that it warns of
transformers_logging.disable_progress_bar()  # of loading a text encoder: half a second

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True, kw_only=True)
class StableDiffusion:
    """The parts of one base model, its UNet inflated."""

    path: Path
    unet: VideoUNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: Schedule

    @property
    def vae_factor(self) -> int:
        """Pixels of a side to one latent (8 for Stable Diffusion)."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local directory of a model: the path itself, or a snapshot of a Hugging Face repository.

    Raises InputError when it is neither.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if len(path.parts) != 2 or path.is_absolute() or str(path_or_hub_id).startswith("."):
        raise InputError(f"model {str(path_or_hub_id)!r} is neither a directory nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = [f"{part}/*.{kind}" for part in _PARTS for kind in ("json", "txt", "safetensors")]
    try:
        found = snapshot_download(
            str(path_or_hub_id), allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.non_ema.*"]
        )
    except Exception as error:  # the hub raises many kinds, and all of them mean the same here
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model {str(path_or_hub_id)!r} is no directory, and the hub does not give it: {reason}"
        ) from None
    return Path(found)


def vae_factor(path: Path) -> int:
    """Pixels of a side to one latent (8 for Stable Diffusion), from the VAE's configuration."""
    return int(2 ** (len(read_json(path / "vae" / "config.json")["block_out_channels"]) - 1))


def native_size(path_or_hub_id: str | Path) -> int:
    """Pixels of a side that the model was trained on."""
    path = resolve(path_or_hub_id)
    return int(read_json(path / "unet" / "config.json")["sample_size"]) * vae_factor(path)


def load_video_unet(
    path_or_hub_id: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> VideoUNet:
    """An inflated UNet from an SD 1.x/2.x model (or its `unet/`), a directory the reference saved, or our checkpoint.

    Raises InputError for UNets of another kind and for files that are missing, corrupt or unpickle code.
    """
    path = resolve(path_or_hub_id)
    if checkpoint.is_checkpoint(path):
        return _load_tuned(path, dtype, device)
    folder = path / "unet" if (path / "unet").is_dir() else path
    if not (folder / "config.json").is_file():
        raise InputError(f"{path} holds no UNet: {folder / 'config.json'} does not exist")
    config = read_json(folder / "config.json")
    weights = checkpoint.load_tensors(checkpoint.weights_file(folder))
    if checkpoint.is_reference_unet(config):
        unet = inflate(_image_unet(checkpoint.image_config(config)))
        _load_strictly(unet, weights, folder)
    else:
        image = _image_unet(config)
        _load_strictly(image, weights, folder)
        unet = inflate(image)
    return unet.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _load_tuned(path: Path, dtype: torch.dtype, device: str | torch.device) -> VideoUNet:
    tuned = checkpoint.load(path)
    unet = load_video_unet(checked_base(tuned.info.base, tuned.info.base_hash), dtype=dtype, device=device)
    put_values(unet, tuned.values)
    return unet


def checked_base(base: str | Path, expected_hash: str) -> Path:
    """The directory of a checkpoint's base model; raises InputError when its content is not what was tuned."""
    path = resolve(base)
    if (found := checkpoint.base_hash(path)) != expected_hash:
        raise InputError(
            f"base {base} has hash {found[:12]}, but the clip was tuned on {expected_hash[:12]}: use that model"
        )
    return path


def put_values(unet: VideoUNet, values: dict[str, Tensor]) -> None:
    """Copies a clip's own values into the UNet; raises InputError for names or shapes it does not have."""
    own = dict(unet.named_parameters())
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            raise InputError(f"value {name} {tuple(value.shape)} does not fit this UNet")
        own[name].data.copy_(value)


def _image_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    settings.setdefault("mid_block_type", "UNetMidBlock2DCrossAttn")
    # Weights follow at once: random ones would cost seconds for SD 1.x.
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(settings)
    return unet.to_empty(device="cpu")


def _load_strictly(model: torch.nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    try:
        found = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{folder}: weights do not fit the configuration: {reason}") from None
    if found.missing_keys or found.unexpected_keys:
        missing, extra = found.missing_keys[:1], found.unexpected_keys[:1]
        raise InputError(f"{folder}: weights do not fit the configuration (missing {missing}, unknown {extra}, …)")


def load(
    path_or_hub_id: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> StableDiffusion:
    """All parts of a Stable Diffusion directory or hub repository, the UNet inflated.

    Raises InputError for parts that are missing or corrupt.
    """
    path = resolve(path_or_hub_id)
    for part in _PARTS:
        if not (path / part).is_dir():
            raise InputError(f"model {path} lacks {part}/: a Stable Diffusion directory has {', '.join(_PARTS)}")
    _check_weights(path / "vae")
    _check_weights(path / "text_encoder")
    safe = checkpoint.weights_file(path / "vae").suffix == ".safetensors"
    vae = AutoencoderKL.from_pretrained(path / "vae", torch_dtype=dtype, low_cpu_mem_usage=False, use_safetensors=safe)
    text_encoder = CLIPTextModel.from_pretrained(path / "text_encoder", dtype=dtype)
    return StableDiffusion(
        path=path,
        unet=load_video_unet(path, dtype=dtype, device=device),
        vae=vae.to(device).eval().requires_grad_(False),
        text_encoder=text_encoder.to(device).eval().requires_grad_(False),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer"),
        schedule=Schedule.from_config(read_json(path / "scheduler" / "scheduler_config.json")),
    )


def _check_weights(folder: Path) -> None:
    file = checkpoint.weights_file(folder)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                pass
        except Exception as error:
            raise InputError(f"{file} is corrupt: {error}") from None
    else:
        checkpoint.load_tensors(file)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Prompts → token ids (prompts, tokens), padded; raises InputError naming words beyond the length."""
    length = tokenizer.model_max_length
    for prompt in prompts:
        ids = tokenizer(prompt, truncation=False).input_ids
        if len(ids) > length:
            beyond = tokenizer.decode(ids[length - 1 : -1], skip_special_tokens=True).strip()
            raise InputError(f"prompt is {len(ids)} tokens long, {length} at most; too much: {beyond!r}")
    batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return batch.input_ids


@torch.no_grad()
def encode_prompt(sd: StableDiffusion, prompts: list[str]) -> Tensor:
    """Prompts → text (prompts, tokens, width), the text encoder's last hidden state."""
    ids = tokenize(sd.tokenizer, prompts).to(sd.text_encoder.device)
    return sd.text_encoder(ids)[0]


@torch.no_grad()
def encode_video(
    sd: StableDiffusion, frames: np.ndarray, *, batch: int = 8, generator: torch.Generator | None = None
) -> Tensor:
    """uint8 frames (f, H, W, 3) → scaled latents (1, c, f, h, w), `batch` frames at a time.

    The mean of the VAE's posterior; with a generator, a sample of it as the reference takes. Raises InputError when
    the size is not a multiple of the VAE's factor.
    """
    check_size(frames.shape[1], frames.shape[2], sd.vae_factor)
    pixels = to_unit(frames).to(sd.vae.device, sd.vae.dtype)
    posteriors = [sd.vae.encode(part).latent_dist for part in pixels.split(batch)]
    latents = torch.cat([p.mean if generator is None else p.sample(generator) for p in posteriors])
    return (latents * sd.vae.config.scaling_factor).transpose(0, 1)[None]  # f c h w → 1 c f h w


@torch.no_grad()
def decode_video(sd: StableDiffusion, latents: Tensor, *, batch: int = 8) -> np.ndarray:
    """Scaled latents (b, c, f, h, w) → uint8 frames (b, f, H, W, 3), `batch` frames at a time."""
    images = latents.transpose(1, 2).flatten(0, 1) / sd.vae.config.scaling_factor  # (b f) c h w
    frames = np.concatenate([to_frames(sd.vae.decode(part).sample) for part in images.to(sd.vae.dtype).split(batch)])
    return frames.reshape(latents.shape[0], latents.shape[2], *frames.shape[1:])


def check_size(height: int, width: int, factor: int) -> None:
    """Raises InputError unless both sides are multiples of the VAE's factor."""
    if height < factor or width < factor or height % factor or width % factor:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise InputError(
            f"size {width}×{height} is not a multiple of {factor} (the VAE's factor): e.g. {near[1]}×{near[0]}"
        )
