"""Random tiny ControlNets and adapters for a base, and maps for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel


def randomised(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A ControlNet's outputs are zero at first: here every weight is a draw."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return net.eval()


def write_controlnet(base: Path, folder: Path, seed: int) -> Path:
    """As diffusers saves it."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    randomised(net, seed).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, seed: int, *, in_channels: int = 3, kind: str = "full_adapter") -> Path:
    """As diffusers saves it."""
    widths = UNet2DConditionModel.load_config(base / "unet")["block_out_channels"]
    net = T2IAdapter(in_channels, list(widths)[: -1 if kind == "light_adapter" else None], 1, 8, adapter_type=kind)
    randomised(net, seed).save_pretrained(folder)
    return folder


def maps_of(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """uint8 (f, H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
