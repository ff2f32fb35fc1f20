"""An untrained model of the demo's architecture: shows that everything runs, never what it looks like."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPTextModel

from tav_opt.demo.emoji import JUDGED
from tav_opt.demo.text import new_tokenizer, text_config
from tav_opt.demo.text2image import new_scheduler, new_unet
from tav_opt.demo.vae import new_vae

SEED = 33


def write_random_model(folder: Path) -> Path:
    """Writes a Stable Diffusion directory with seeded random weights and returns it."""
    torch.manual_seed(SEED)
    vae = new_vae()
    tokenizer = new_tokenizer(JUDGED)
    parts = {
        "vae": vae,
        "unet": new_unet(),
        "text_encoder": CLIPTextModel(text_config(tokenizer)),
        "tokenizer": tokenizer,
        "scheduler": new_scheduler(),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder
