"""Small pictures of latents, by the linear map that comes closest to what the decoder makes of the clip itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tav_opt.video.pixels import to_unit


def fit(latents: Tensor, frames: np.ndarray) -> Tensor:
    """The map (c + 1, 3) from latents (1, c, f, h, w), and one, to colours, by least squares.

    `frames` are uint8 (f, H, W, 3), what the latents decode to; each latent pixel stands for the mean of its square.
    """
    small = functional.adaptive_avg_pool2d(to_unit(frames), (latents.shape[-2], latents.shape[-1]))  # f 3 h w
    colours = small.movedim(1, -1).reshape(-1, 3)
    return torch.linalg.lstsq(_rows(latents), colours, driver="gelsd").solution


def picture(latents: Tensor, colours: Tensor) -> np.ndarray:
    """Latents (b, c, f, h, w) by a fitted map → uint8 (b, f, h, w, 3)."""
    b, _, f, h, w = latents.shape
    pixels = (_rows(latents) @ colours).reshape(b, f, h, w, 3)
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _rows(latents: Tensor) -> Tensor:  # b c f h w → (b f h w) (c + 1)
    values = latents.cpu().float().movedim(1, -1)
    return torch.cat([values, torch.ones_like(values[..., :1])], -1).flatten(0, -2)
