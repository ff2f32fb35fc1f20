"""Stable Diffusion 1.5 with random weights, made where it shall run and in the dtype that it shall have.

On a GPU that takes seconds, and nothing is written. Random weights are as fast as any; what they draw is noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tav_opt.base.directory import Base
from tav_opt.ddim import Schedule
from tav_opt.models import StableDiffusion
from tav_opt.unet import inflate

UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT = CLIPTextConfig(
    vocab_size=49408,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
    eos_token_id=257,
    bos_token_id=256,
    pad_token_id=257,
)
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SMALL_UNET = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
"""That of a dry run: as many kinds of parts, few of each."""
LIKE_UNET = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "block_out_channels": (64, 128, 192, 192),
}
"""Its blocks, all of them, at widths of the demo's."""
LIKE_VAE = {
    "block_out_channels": (32, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 128,
}
SMALL_VAE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
}
SMALL_TEXT = CLIPTextConfig(
    vocab_size=600,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    projection_dim=32,
    eos_token_id=257,
    bos_token_id=256,
    pad_token_id=257,
)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts as diffusers and transformers have them."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler


Kind = Literal["whole", "like", "small"]
"""As it is, with all its blocks at widths of the demo's, or for a dry run."""
_KINDS: dict[Kind, tuple[dict[str, Any], dict[str, Any], CLIPTextConfig]] = {
    "whole": (UNET, VAE, TEXT),
    "like": (LIKE_UNET, LIKE_VAE, SMALL_TEXT),
    "small": (SMALL_UNET, SMALL_VAE, SMALL_TEXT),
}


def parts(device: torch.device, dtype: torch.dtype, *, kind: Kind = "whole") -> Parts:
    """All parts, the same at every call on one kind of device."""
    torch.manual_seed(0)
    unet_settings, vae_settings, text_config = _KINDS[kind]
    with device, _default(dtype):
        unet = UNet2DConditionModel(**unet_settings)
        vae = AutoencoderKL(**vae_settings)
        text_encoder = CLIPTextModel(text_config)
    return Parts(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=byte_tokenizer(),
        scheduler=DDIMScheduler(**SCHEDULER),
    )


def stable_diffusion(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> StableDiffusion:
    """The same, its UNet inflated, ready to edit with; temporal attention is random, so that it counts."""
    made = parts(device, dtype, kind="small" if small else "whole")
    with device, _default(dtype):
        unet = inflate(made.unet)
        for name, value in unet.named_parameters():
            if name.endswith("attn_temp.to_out.0.weight"):
                torch.nn.init.normal_(value, std=0.02)
    configs = {"unet": dict(made.unet.config), "vae": dict(made.vae.config), "scheduler": dict(SCHEDULER)}
    return StableDiffusion(
        base=Base(path=Path("random"), folder=Path("random"), configs=configs),
        unet=unet.to(device, dtype).eval().requires_grad_(False),
        vae=made.vae.to(device, dtype).eval().requires_grad_(False),
        text_encoder=made.text_encoder.to(device, dtype).eval().requires_grad_(False),
        tokenizer=made.tokenizer,
        schedule=Schedule.from_config(SCHEDULER),
    )


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """What new parameters are made in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges, one token a byte: CLIP's own vocabulary is no part of a random model."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
