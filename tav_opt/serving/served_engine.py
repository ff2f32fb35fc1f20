"""What serving asks of an engine beyond what every edit does."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np
from torch import Tensor

from tav_opt.ddim import Text, Timestep
from tav_opt.engines import Engine

GoOn = Callable[[], None]
"""Raises ddim.Stopped when the edit shall stop."""


class ServedEngine(Engine, Protocol):
    """An exported clip."""

    @property
    def revision(self) -> str:
        """Another for every export, and for every engine."""

    def predict(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        """`timestep`: one for all rows, or int64 (b,)."""

    def decode(self, latents: Tensor, on_part: GoOn = lambda: None) -> np.ndarray:
        """As every engine; `on_part` is called before each call of the VAE."""

    def extra_bytes(
        self,
        prompts: int,
        *,
        encode: bool = False,
        windows: int = 1,
        told: Collection[str] = ("text",),
        controls: Collection[str] = (),
        frames: int = 0,
    ) -> int:
        """Memory that an edit of so many prompts in one batch needs beyond what is held; `encode`: of other frames.

        `windows` of a long clip go through the network at once; `told`: the names of what the UNet is told; `controls`:
        the networks whose maps it follows, of so many `frames` where the source has more than the clip.
        """
