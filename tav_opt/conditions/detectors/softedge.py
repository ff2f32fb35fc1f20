"""Soft edges by HED (Xie & Tu 2015, arXiv 1504.06375), with the weights that ControlNet's authors published."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tav_opt.base import weights
from tav_opt.base.image_model import load_strictly
from tav_opt.config import InputError, PathLike

HUB_ID, FILE = "lllyasviel/Annotators", "ControlNetHED.pth"
_WIDTHS = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
"""Of its five blocks: channels in and out, convolutions."""


class Block(nn.Module):
    """Convolutions, and what their last shows of edges."""

    def __init__(self, channels: int, width: int, count: int) -> None:
        super().__init__()
        widths = [channels, *[width] * count]
        self.convs = nn.ModuleList(nn.Conv2d(one, other, 3, padding=1) for one, other in pairwise(widths))
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class Hed(nn.Module):
    """Pictures (n, 3, H, W) in 0…255 → edges (n, H, W) in 0…1."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        for number, (channels, width, count) in enumerate(_WIDTHS, start=1):
            self.add_module(f"block{number}", Block(channels, width, count))

    def forward(self, pictures: Tensor) -> Tensor:
        x, seen = pictures - self.norm, []
        for number in range(1, len(_WIDTHS) + 1):
            x = x if number == 1 else F.max_pool2d(x, 2)
            x, edges = self.get_submodule(f"block{number}")(x)
            seen.append(F.interpolate(edges, pictures.shape[-2:], mode="bilinear", align_corners=False))
        return torch.cat(seen, 1).mean(1).sigmoid()


@torch.no_grad()
def detect(frames: np.ndarray, place: PathLike | None = None) -> np.ndarray:
    """uint8 (f, H, W, 3) → grey maps of that shape; `place` is the file of the weights."""
    if min(frames.shape[1:3]) < 16:
        raise InputError(f"softedge: frames of {frames.shape[2]}×{frames.shape[1]} are too small: 16 pixels at least")
    path = _fetched() if place is None else Path(place)
    net = Hed()
    load_strictly(net, weights.load_single(path), path)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    grey = torch.cat([net(part) for part in pixels.split(1)]).mul(255).round().to(torch.uint8)
    return grey[..., None].repeat(1, 1, 1, 3).numpy()


def _fetched() -> Path:
    from tav_opt.base import hub

    return hub.fetch_file(HUB_ID, FILE)
