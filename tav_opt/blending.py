"""Edits that change nothing outside a mask: there each step goes on from the source's latents, not from what is drawn.

As Blended Latent Diffusion has it (Avrahami et al. 2023, arXiv 2206.02779). The source at a step's noise is on the
line from its latents to those that sampling starts from, so that both begin alike and nothing is stored but the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tav_opt import ddim
from tav_opt.config import InputError

FEATHER = torch.tensor([1.0, 2.0, 1.0]) / 4
"""Over one latent to either side, eight pixels of Stable Diffusion's, an edit goes over into the source."""


def feathered(mask: np.ndarray, latents: Tensor) -> Tensor:
    """How much of an edit stands at each latent of (1,c,f,h,w), 0…1: (1,1,f or 1,h,w).

    `mask` is bool (1 or f, H, W) in pixels, true where the picture may change. Raises InputError for another shape,
    and for a mask that lets nothing change.
    """
    _, _, frames, height, width = latents.shape
    told = f"mask {mask.dtype} {mask.shape}"
    if mask.dtype != np.bool_ or mask.ndim != 3 or len(mask) not in (1, frames):
        raise InputError(f"{told}: must be bool (1 or {frames}, H, W)")
    if mask.shape[1] * width != mask.shape[2] * height or mask.shape[1] % height:
        raise InputError(f"{told}: must be of the frames' height and width")
    if not mask.any():
        raise InputError("the mask is black all over: nothing may change")
    share = F.adaptive_avg_pool2d(torch.from_numpy(mask)[:, None].float(), (height, width))
    share = F.conv2d(F.pad(share, (1, 1, 1, 1), mode="replicate"), torch.outer(FEATHER, FEATHER)[None, None])
    return share.transpose(0, 1)[None].to(latents)  # f 1 h w → 1 1 f h w


@dataclass(frozen=True, kw_only=True)
class Blend:
    """What `ddim.sample` goes on from in each step's place."""

    share: Tensor
    """(1,1,f or 1,h,w), of the edit."""
    source: Tensor
    """(1,c,f,h,w), clean."""
    noise: Tensor
    """(1,c,f,h,w), what turns it into the latents that sampling starts from."""

    @classmethod
    def of(cls, mask: np.ndarray, source: Tensor, start: Tensor, alpha: float) -> Blend:
        """Of a source's latents (1,c,f,h,w), and those that sampling starts from at ᾱ; raises as `feathered` does."""
        noise = (start - alpha**0.5 * source) / (1 - alpha) ** 0.5
        return cls(share=feathered(mask, source), source=source, noise=noise)

    def __call__(self, latents: Tensor, alpha: float) -> Tensor:
        """Latents (b,c,f,h,w) at ᾱ, the source in their place where nothing may change."""
        return self.share * latents + (1 - self.share) * ddim.noised(self.source, self.noise, alpha)
