"""The same parts of a pipeline over PyTorch, ONNX Runtime or TensorRT: what editing, serving and benchmarks drive."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from tav_opt.conditions.condition import Network
from tav_opt.config import ClipConfig, EngineName
from tav_opt.contract import ClipInfo
from tav_opt.ddim import Schedule, Text, Timestep


class Engine(Protocol):
    """One clip, ready to be edited."""

    @property
    def kind(self) -> EngineName:
        """What runs it."""

    @property
    def info(self) -> ClipInfo:
        """What is known of the clip."""

    @property
    def schedule(self) -> Schedule:
        """Of the base model."""

    @property
    def source_latents(self) -> Tensor:
        """(1, c, f, h, w), scaled; f may be more than `info.network_frames`, of which `predict` takes as many."""

    @property
    def inverted_latents(self) -> Tensor:
        """(1, c, f, h, w): of the source, by `info.inversion`."""

    @property
    def source(self) -> ClipConfig | None:
        """Which frames of which video the clip is; None where nobody kept that."""

    @property
    def sound(self) -> bytes | None:
        """Of the source's time, as a Matroska file; None where it has none."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the text encoder: which words of a prompt are which tokens."""

    @property
    def networks(self) -> Mapping[str, Network]:
        """What follows maps, by name."""

    def encode_text(self, prompts: str | Sequence[str]) -> Tensor:
        """→ (prompts, tokens, width); raises InputError for prompts over the tokenizer's length."""

    def encode_video(self, frames: np.ndarray) -> Tensor:
        """uint8 (f, H, W, 3) → scaled latents (1, c, f, h, w)."""

    def check_told(self, told: Collection[str]) -> None:
        """Raises InputError where the UNet cannot be told tensors of these names, `text` among them."""

    def predict(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        """latents (b, c, f, h, w), text (b, tokens, width) → noise or v (b, c, f, h, w); nothing leaves the device.

        A mapping has `text` in it, and what else the UNet is told, by the names of `unet.arguments`. Raises InputError
        where that is more than the engine can tell it.
        Told of attention control it answers with one channel more: where the blend words look.
        """

    def predict_with_features(self, latents: Tensor, timestep: Timestep, text: Tensor) -> tuple[Tensor, Tensor]:
        """As `predict`, and the features (b, f, c', h, w) that came to the UNet's outermost layers from below.

        `predict` runs those layers alone where it is told of features, by that name, beside the text.
        """

    def decode(self, latents: Tensor) -> np.ndarray:
        """Scaled latents (b, c, f, h, w) → uint8 frames (b, f, H, W, 3), which come to the host in one transfer."""
