"""Depth by a network of transformers, over the whole clip at one scale: near is bright."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tav_opt.base import directory
from tav_opt.config import InputError, PathLike, first_line
from tav_opt.files import read_object

MODEL = "Intel/dpt-hybrid-midas"
"""MiDaS, with which the depth ControlNets' maps were made."""


@torch.no_grad()
def detect(frames: np.ndarray, place: PathLike | None = None) -> np.ndarray:
    """uint8 (f, H, W, 3) → grey maps of that shape; `place` is a directory or hub id of a depth network."""
    folder = directory.resolve(place or MODEL, network=True)
    net, (height, width) = _network(folder), frames.shape[1:3]
    prepared = _prepared(frames, folder)
    seen = torch.cat([net(part).predicted_depth for part in prepared.split(1)])  # f h w
    depth = F.interpolate(seen[:, None], (height, width), mode="bicubic", align_corners=False)[:, 0]
    if getattr(net.config, "depth_estimation_type", "relative") == "metric":  # metres, not their inverse
        depth = 1 / depth.clamp(min=1e-3)
    low, high = depth.min(), depth.max()
    grey = (255 * (depth - low) / (high - low).clamp(min=1e-6)).round().to(torch.uint8)
    return grey[..., None].repeat(1, 1, 1, 3).numpy()


def _network(folder: Path) -> Any:
    from transformers import AutoModelForDepthEstimation

    try:
        net = AutoModelForDepthEstimation.from_pretrained(folder, local_files_only=True)  # nosec B615  # a folder
    except Exception as error:  # of as many kinds as there are ways to be wrong
        raise InputError(f"{folder} holds no depth network of transformers: {first_line(error)}") from None
    return net.eval().requires_grad_(False)


def _prepared(frames: np.ndarray, folder: Path) -> Tensor:
    """→ (f, 3, h, w) as the network's own preprocessor has it."""
    told = read_object(folder / "preprocessor_config.json")
    size = told.get("size", {"height": 384, "width": 384})
    size = size if isinstance(size, dict) else {"height": size, "width": size}
    mean, std = (torch.tensor(told.get(name, [0.5] * 3)).view(3, 1, 1) for name in ("image_mean", "image_std"))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    resized = F.interpolate(
        pixels, (size["height"], size["width"]), mode="bicubic", align_corners=False, antialias=True
    )
    return (resized.clamp(0, 1) - mean) / std
