"""Maps that an edit shall follow: what a network makes of them is added inside the UNet, at every step or at some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tav_opt.config import Control, InputError
from tav_opt.ddim import Predict, Text, Timestep

DOWN = "down_block_additional_residuals"
MID = "mid_block_additional_residual"
INSIDE = "down_intrablock_additional_residuals"
"""Where the UNet takes what is added, by diffusers' names; the parts of a sequence are `name.0`, `name.1`, …"""
HINT = "hint"
"""What a ControlNet sees of its maps, by its authors' name."""


def is_added(name: str) -> bool:
    """Whether a tensor of this name is (b,f,c',h',w') to be added, not what the UNet is told otherwise."""
    return name.partition(".")[0] in (DOWN, MID, INSIDE)


_FLOAT32 = 1e-6
"""As near as a share of the steps comes over the wire."""

Residuals = Callable[[Tensor, Timestep, Tensor], dict[str, Tensor]]
"""latents (b,c,f,h,w), timestep, text (b,tokens,width) → what is added, each (b,f,c',h',w'), by where."""


class Network(Protocol):
    """What makes residuals of maps, frame by frame, as in the image model."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of what it adds."""

    def following(self, maps: Tensor, scale: float) -> Residuals:
        """maps (f, 3, H, W) in 0…1 → what is added at a step, times `scale`."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A network that has its maps."""

    control: Control
    names: tuple[str, ...]
    residuals: Residuals

    def acts(self, number: int, steps: int) -> bool:
        """In the step of this number, from 0, of so many: as diffusers' pipelines have it."""
        start, end = self.control.start - _FLOAT32, self.control.end + _FLOAT32
        return number / steps >= start and (number + 1) / steps <= end


def conditions(
    networks: Mapping[str, Network],
    controls: Iterable[Control],
    maps: Mapping[str, np.ndarray],
    shape: Sequence[int],
    device: torch.device,
) -> list[Condition]:
    """Networks by name, what is asked of them, uint8 maps of `shape` (f, H, W, 3) by name → the edit's conditions.

    What does not change from step to step is computed here. Raises InputError, naming what would be right.
    """
    controls = tuple(controls)
    check(controls, maps, networks)
    return [_condition(networks[one.name], one, _checked(one.name, maps[one.name], shape), device) for one in controls]


def check(controls: Sequence[Control], maps: Iterable[str], networks: Iterable[str]) -> None:
    """Raises InputError where names are given twice, or controls, maps and networks are not of the same names."""
    names, maps, networks = [one.name for one in controls], list(maps), list(networks)
    for one in controls:
        if names.count(one.name) > 1:
            raise InputError(f"control {one.name!r} is given twice")
        if one.start >= one.end:
            raise InputError(f"control {one.name}: start {one.start:g} is not before end {one.end:g}")
        if one.name not in networks:
            raise InputError(f"control {one.name!r} has no network; there is {', '.join(sorted(networks)) or 'none'}")
        if one.name not in maps:
            raise InputError(f"control {one.name!r} has no maps to follow")
    if idle := sorted(set(maps) - set(names)):
        raise InputError(f"maps of {idle[0]!r}, but no control of that name")


def _checked(name: str, maps: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    if maps.shape != tuple(shape) or maps.dtype != np.uint8:
        frames, height, width = shape[:3]
        raise InputError(
            f"control {name}: its maps are {maps.dtype} {maps.shape}, but the clip takes uint8 "
            f"{frames} frames of {width}×{height}, 3 colours"
        )
    return maps


@torch.no_grad()
def _condition(network: Network, control: Control, maps: np.ndarray, device: torch.device) -> Condition:
    pixels = torch.from_numpy(maps.copy()).to(device).permute(0, 3, 1, 2).float() / 255  # (f, 3, H, W)
    return Condition(control=control, names=network.names, residuals=network.following(pixels, control.scale))


class Conditioned:
    """`predict` of one run of so many steps, told at each what the conditions add; the loop knows nothing of them."""

    def __init__(self, predict: Predict, conditions: Sequence[Condition], steps: int) -> None:
        self._predict, self._conditions, self._steps = predict, conditions, steps
        self._done = 0

    def __call__(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        number, self._done = self._done, self._done + 1
        acting = [one for one in self._conditions if one.acts(number, self._steps)]
        return self._predict(latents, timestep, told(acting, latents, timestep, text))


def always(predict: Predict, conditions: Sequence[Condition]) -> Predict:
    """`predict` told at every call what the conditions add, whatever their windows: for a run of unknown length."""
    return lambda latents, timestep, text: predict(latents, timestep, told(conditions, latents, timestep, text))


@torch.no_grad()
def told(conditions: Sequence[Condition], latents: Tensor, timestep: Timestep, text: Text) -> Text:
    """The text, and the sum of what the conditions add in each place."""
    words = text if isinstance(text, Tensor) else text["text"]
    found: dict[str, Tensor] = {}
    for one in conditions:
        for name, residual in one.residuals(latents, timestep, words).items():
            found[name] = found[name] + residual if name in found else residual
    if not found:
        return text
    return ({"text": text} if isinstance(text, Tensor) else dict(text)) | found
