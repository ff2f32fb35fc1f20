"""A base model without its values, on no device: what estimates count, in milliseconds."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tav_opt.base import configuration
from tav_opt.base.directory import Base
from tav_opt.ddim import Schedule
from tav_opt.models import StableDiffusion
from tav_opt.unet import inflate


def of(base: Base, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """The parts as `models.load` would load them, but for the tokenizer; nothing can be computed with them."""
    config = base.configs["unet"]
    config = configuration.image_config(config) if configuration.is_reference_unet(config) else config
    with torch.device("meta"):
        unet = inflate(UNet2DConditionModel.from_config(_settings(config)))
        vae = AutoencoderKL.from_config(_settings(base.configs["vae"]))
        text_config = CLIPTextConfig.from_dict(configuration.text_config(base.configs["text_encoder"]))
        text_encoder = CLIPTextModel(text_config)
    return StableDiffusion(
        base=base,
        unet=unet.to(dtype),
        vae=vae.to(dtype),
        text_encoder=text_encoder.to(dtype),
        tokenizer=cast(Any, None),
        schedule=Schedule.from_config(base.configs["scheduler"]),
    )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}
