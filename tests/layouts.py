"""Models laid out as people have them: written by the hub's own functions from the reference's small model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

PARTS = ("unet", "vae", "text_encoder")
LAYOUTS = {
    "bin": (),
    "safetensors": ("safetensors",),
    "fp16 bin": ("fp16",),
    "fp16 safetensors": ("fp16", "safetensors"),
    "bin shards": ("shards",),
    "safetensors shards": ("safetensors", "shards"),
    "fp16 safetensors shards": ("fp16", "safetensors", "shards"),
}


def tensors(folder: Path) -> dict[str, Tensor]:
    """The values of a part of the reference's model."""
    return torch.load(next(folder.glob("*.bin")), weights_only=True)


def lay_out(base: Path, folder: Path, layout: str) -> Path:
    """A copy of the reference's model whose three parts have their weights so."""
    shutil.copytree(base, folder)
    for part in PARTS:
        write(tensors(base / part), folder / part, layout)
    return folder


def write(values: dict[str, Tensor], folder: Path, layout: str) -> None:
    """The only weights of a part, so laid out."""
    for old in folder.glob("*.bin"):
        old.unlink()
    options = LAYOUTS[layout]
    safe = "safetensors" in options
    stem = "diffusion_pytorch_model" if folder.name != "text_encoder" else "model" if safe else "pytorch_model"
    half = ".fp16" if "fp16" in options else ""
    if half:
        values = {name: value.half() if value.is_floating_point() else value for name, value in values.items()}
    save_torch_state_dict(
        values,
        folder,
        filename_pattern=f"{stem}{half}{{suffix}}.{'safetensors' if safe else 'bin'}",
        max_shard_size="40KB" if "shards" in options else "5GB",
        safe_serialization=safe,
    )
