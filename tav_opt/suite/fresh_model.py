"""A base's video model that clip after clip is tuned and edited on, loaded once: what a clip changed is put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tav_opt import models, tuning
from tav_opt.base.directory import Base
from tav_opt.config import TrainConfig
from tav_opt.models import StableDiffusion
from tav_opt.unet import clip_value_names


@dataclass(frozen=True, kw_only=True)
class FreshModel:
    """A model, and the values that tuning changes as they are before it; those lie in the processor's memory."""

    sd: StableDiffusion
    values: dict[str, Tensor]

    @classmethod
    def load(cls, base: Base, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> FreshModel:
        """As `tuning.load` gives it."""
        sd = tuning.load(base, config, device=device, dtype=dtype)
        own = dict(sd.unet.named_parameters())
        names = clip_value_names(sd.unet, config.trainable)
        return cls(sd=sd, values={name: own[name].detach().to("cpu", copy=True) for name in names})

    def again(self) -> StableDiffusion:
        """The model as it was loaded."""
        self.sd.unet.requires_grad_(False)
        self.sd.unet.disable_gradient_checkpointing()
        models.put_values(self.sd.unet, self.values)
        return self.sd


def is_kept(config: TrainConfig) -> bool:
    """Whether tuning changes nothing but a clip's values: autocast rounds all others."""
    return config.autocast == "no"
