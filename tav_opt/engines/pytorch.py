"""Eager PyTorch: the reference for every other engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tav_opt import checkpoint, memory, models
from tav_opt.contract import ClipInfo
from tav_opt.ddim import Schedule


@dataclass(frozen=True, kw_only=True)
class TorchEngine:
    """A tuned clip on its base model; see `engines.Engine`."""

    sd: models.StableDiffusion
    info: ClipInfo
    source_latents: Tensor
    inverted_latents: Tensor

    @property
    def schedule(self) -> Schedule:
        return self.sd.schedule

    def encode_text(self, prompts: list[str]) -> Tensor:
        return models.encode_prompt(self.sd, prompts)

    def encode_video(self, frames: np.ndarray) -> Tensor:
        return models.encode_video(self.sd, frames)

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: int, text: Tensor) -> Tensor:
        timesteps = torch.full((latents.shape[0],), timestep, device=latents.device)
        return self.sd.unet(latents, timesteps, text)

    def decode(self, latents: Tensor) -> np.ndarray:
        return models.decode_video(self.sd, latents)


def open_checkpoint(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, base: str | None = None
) -> TorchEngine:
    """Loads a checkpoint and its base (`base` where it has moved).

    Raises InputError when either is missing, altered, or they do not belong together.
    """
    tuned = checkpoint.load(folder)
    sd = models.load(models.checked_base(base or tuned.info.base, tuned.info.base_hash), dtype=dtype, device=device)
    models.put_values(sd.unet, tuned.values)
    memory.check_editing(sd, tuned.info.frames, tuned.info.height, tuned.info.width)
    return TorchEngine(
        sd=sd,
        info=tuned.info,
        source_latents=tuned.source_latents.to(device, dtype),
        inverted_latents=tuned.inverted_latents.to(device, dtype),
    )
