"""The parts of a Stable Diffusion directory: video UNet, VAE, text encoder, tokenizer, schedule."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from tav_opt import checkpoint
from tav_opt.base import configuration, weights
from tav_opt.base.directory import Base, checked_base, resolve
from tav_opt.config import InputError, PathLike, first_line, texts
from tav_opt.ddim import Schedule, Timestep, timestep_rows
from tav_opt.device import usable_device
from tav_opt.files import read_object, refuse_pointer
from tav_opt.unet import VideoUNet, clip_value_names, inflate
from tav_opt.video.pixels import to_frames, to_host, to_unit

diffusers_logging.set_verbosity_error()  # configurations of 2022 hold entries that it warns of
transformers_logging.set_verbosity_error()  # what of its tables matters is said below, in one line
transformers_logging.disable_progress_bar()  # of loading a text encoder: half a second

Model = TypeVar("Model", UNet2DConditionModel, AutoencoderKL)
Module = TypeVar("Module", bound=torch.nn.Module)

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of the VAE's attention, until diffusers 0.17."""
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
    def predict(self, latents: Tensor, timestep: Timestep, text: Tensor) -> Tensor:
        """latents (b,c,f,h,w), text (b,tokens,width) → noise or v (b,c,f,h,w)."""
        return self.unet(latents, timestep_rows(timestep, latents), text)


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
        unet = _unet_of(checked_base(tuned.info.base, tuned.info.base_hash))
        put_values(unet, tuned.values)
    else:
        folder = path / "unet" if (path / "unet").is_dir() else path
        if not (folder / "config.json").is_file():
            raise InputError(f"{path} holds no UNet: {folder / 'config.json'} does not exist")
        config = read_object(folder / "config.json")
        configuration.check_unet(config, folder / "config.json")
        unet = _unet(config, weights.files(folder))
    return _placed(unet, device, dtype)


def _placed(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """Frozen, on its device; channels come last in its convolutions, which is faster wherever it was measured
    (benchmarks/memory_format.py)."""
    module.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module.eval().requires_grad_(False)


def _unet_of(base: Base) -> VideoUNet:
    return _unet(base.configs["unet"], base.files["unet"])


def _unet(config: dict[str, Any], files: list[Path]) -> VideoUNet:
    folder = files[0].parent
    if checkpoint.is_reference_unet(config):
        unet = inflate(_empty(UNet2DConditionModel, checkpoint.image_config(config), folder))
        _load_strictly(unet, weights.read(files), folder)
        return unet
    return inflate(_image_unet(config, files))


def _image_unet(config: dict[str, Any], files: list[Path]) -> UNet2DConditionModel:
    image = _empty(UNet2DConditionModel, config, files[0].parent)
    _load_strictly(image, weights.read(files), files[0].parent)
    return image


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


def _empty(kind: type[Model], config: dict[str, Any], folder: Path) -> Model:
    """A model of diffusers without values: weights follow at once, and random ones would cost seconds for SD 1.x."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            model = kind.from_config(settings)
    except Exception as error:  # of as many kinds as there are ways to be wrong
        raise InputError(f"{folder / 'config.json'} describes no {kind.__name__}: {first_line(error)}") from None
    return model.to_empty(device="cpu")


def _load_strictly(model: torch.nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        found = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{folder}: weights do not fit the configuration: {reason}") from None
    if found.missing_keys or found.unexpected_keys:
        missing, extra = found.missing_keys[:1], found.unexpected_keys[:1]
        raise InputError(f"{folder}: weights do not fit the configuration (missing {missing}, unknown {extra}, …)")


def load(
    path_or_hub_id: PathLike | Base, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> StableDiffusion:
    """All parts of a Stable Diffusion directory or hub repository, the UNet inflated.

    Raises InputError for parts that are missing or corrupt.
    """
    return _loaded(Base.at(path_or_hub_id), _unet_of, dtype, device)


def load_image(
    path_or_hub_id: PathLike | Base, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> StableDiffusion:
    """The same parts, the UNet diffusers' own as it is: it predicts images (b,c,h,w), and `predict` is not for it.

    Raises InputError, also for a UNet that the reference inflated and tuned.
    """

    def unet(base: Base) -> Any:
        if checkpoint.is_reference_unet(base.configs["unet"]):
            raise InputError(f"{base.path} holds a UNet that was inflated and tuned, not one of images")
        return _image_unet(base.configs["unet"], base.files["unet"])

    return _loaded(Base.at(path_or_hub_id), unet, dtype, device)


def _loaded(
    base: Base, unet: Callable[[Base], VideoUNet], dtype: torch.dtype, device: str | torch.device
) -> StableDiffusion:
    device = usable_device(device)
    if halves := [f"{part}/{files[0].name}" for part, files in base.files.items() if weights.is_half(files[0].name)]:
        _log.warning("model %s has weights of half precision only: %s", base.path, ", ".join(halves))
    tokenizer = load_tokenizer(base)
    vae = _vae(base)
    text_encoder = _text_encoder(base, dtype)
    return StableDiffusion(
        base=base,
        unet=_placed(unet(base), device, dtype),
        vae=_placed(vae, device, dtype),
        text_encoder=text_encoder.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        schedule=Schedule.from_config(base.configs["scheduler"]),
    )


def _vae(base: Base) -> AutoencoderKL:
    folder = base.path / "vae"
    vae = _empty(AutoencoderKL, base.configs["vae"], folder)
    old = re.compile(rf"(?<=attentions\.0\.)({'|'.join(_OLD_NAMES)})(?=\.)")
    tensors = weights.read(base.files["vae"])
    _load_strictly(vae, {old.sub(lambda found: _OLD_NAMES[found[0]], name): x for name, x in tensors.items()}, folder)
    return vae


def _text_encoder(base: Base, dtype: torch.dtype) -> CLIPTextModel:
    folder = base.path / "text_encoder"
    try:
        config = CLIPTextConfig.from_dict(configuration.text_config(base.configs["text_encoder"]))
        with torch.device("meta"):
            CLIPTextModel(config)
    except InputError:
        raise
    except Exception as error:  # of as many kinds as there are ways to be wrong
        raise InputError(f"{folder / 'config.json'} describes no text encoder: {first_line(error)}") from None
    model, found = CLIPTextModel.from_pretrained(  # nosec B615  # of tensors that were read
        None,
        config=config,
        state_dict=weights.read(base.files["text_encoder"]),
        dtype=dtype,
        ignore_mismatched_sizes=True,  # they are refused below
        output_loading_info=True,
    )
    for fault in ("missing", "mismatched"):
        if names := [name if isinstance(name, str) else name[0] for name in found[f"{fault}_keys"]]:
            raise InputError(f"{folder}: weights do not fit the configuration ({fault} {sorted(names)[:1]}, …)")
    return model


def load_tokenizer(base: Base) -> CLIPTokenizer:
    """The tokenizer, told how many tokens the text encoder reads where it allows more, or says nothing.

    Raises InputError where it is missing or of another model.
    """
    folder, text = base.path / "tokenizer", configuration.text_config(base.configs["text_encoder"])
    names = [file.name for file in folder.iterdir()]
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= {*names}:
        raise InputError(f"{folder} holds neither tokenizer.json nor vocab.json and merges.txt")
    for name in names:
        if name.endswith((".json", ".txt")):
            refuse_pointer(folder / name)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)  # nosec B615  # a folder
    except Exception as error:
        raise InputError(f"{folder} holds no CLIP tokenizer: {first_line(error)}") from None
    if len(tokenizer) > (known := text.get("vocab_size", 49408)):
        raise InputError(
            f"{base.path}: tokenizer and text encoder do not belong together: {len(tokenizer)} tokens, "
            f"vocab_size = {known}"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text.get("max_position_embeddings", 77))
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: str | Sequence[str]) -> Tensor:
    """Prompts → token ids (prompts, tokens), padded; raises InputError naming words beyond the length."""
    prompts, length = list(texts("prompts", prompts)), tokenizer.model_max_length
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
    frames = torch.cat([to_frames(sd.vae.decode(part).sample) for part in images.to(sd.vae.dtype).split(batch)])
    return to_host(frames).reshape(latents.shape[0], latents.shape[2], *frames.shape[1:])


def check_size(height: int, width: int, factor: int) -> None:
    """Raises InputError unless both sides are multiples of the VAE's factor."""
    if height < factor or width < factor or height % factor or width % factor:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise InputError(
            f"size {width}×{height} is not a multiple of {factor} (the VAE's factor): e.g. {near[1]}×{near[0]}"
        )
