"""Networks run frame by frame on the clips of a batch, whatever runs them; see `condition.Network`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tav_opt.conditions.condition import HINT, Residuals
from tav_opt.ddim import Timestep, timestep_rows

Run = Callable[..., Mapping[str, Tensor]]
"""Tensors of n frames by name → what is added for each, (n,c',h',w'), by where."""
AT_ONCE = 24
"""Frames in one call of a network."""


@dataclass(frozen=True, kw_only=True)
class ControlNet:
    """A network that looks at its maps once an edit; at what it saw, the latents and the text, once a step."""

    run: Run
    """Takes latents (n,c,h,w), timestep (n,), text (n,tokens,width) and the hint (n,c',h,w)."""
    see: Run
    """Takes maps (n,3,H,W), and gives the hint."""
    names: tuple[str, ...]
    at_once: int = AT_ONCE
    module: nn.Module | None = None
    """What is run, where that is in eager PyTorch: its memory is counted."""

    def following(self, maps: Tensor, scale: float) -> Residuals:
        hint = torch.cat([self.see(maps=part)[HINT] for part in maps.split(self.at_once)])  # f c' h w

        def residuals(latents: Tensor, timestep: Timestep, text: Tensor) -> dict[str, Tensor]:
            b, _, f, _, _ = latents.shape
            given = {
                "latents": latents.transpose(1, 2).flatten(0, 1),  # (b f) c h w
                "timestep": timestep_rows(timestep, latents).repeat_interleave(f),
                "text": text.repeat_interleave(f, 0),
                HINT: hint.repeat(b, 1, 1, 1),
            }
            parts = zip(*(x.split(self.at_once) for x in given.values()), strict=True)
            made = [self.run(**dict(zip(given, part, strict=True))) for part in parts]
            return {name: scale * torch.cat([one[name] for one in made]).unflatten(0, (b, f)) for name in self.names}

        return residuals


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A network that looks at its maps alone, once an edit."""

    run: Run
    """Takes maps (n,3,H,W)."""
    names: tuple[str, ...]
    at_once: int = AT_ONCE
    module: nn.Module | None = None
    """What is run, where that is in eager PyTorch: its memory is counted."""

    def following(self, maps: Tensor, scale: float) -> Residuals:
        made = [self.run(maps=part) for part in maps.split(self.at_once)]
        features = {name: scale * torch.cat([one[name] for one in made])[None] for name in self.names}  # 1 f c h w

        def residuals(latents: Tensor, _timestep: Timestep, _text: Tensor) -> dict[str, Tensor]:
            return {name: feature.expand(len(latents), -1, -1, -1, -1) for name, feature in features.items()}

        return residuals


def in_eager(frames: nn.Module, names: tuple[str, ...]) -> Run:
    """A module of frames whose inputs have the names that it is called by."""

    @torch.no_grad()
    def run(**given: Tensor) -> Mapping[str, Tensor]:
        return dict(zip(names, frames(**given), strict=True))

    return run
