"""Whether an edit keeps the layout of its source, whatever it looks like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from tav_opt.base.directory import resolve
from tav_opt.config import InputError, MetricsConfig, PathLike
from tav_opt.files import read_object
from tav_opt.metrics.networks import load_network, load_processor

KINDS = ("vit", "dinov2")
"""Of transformers, that see all of a picture and have keys of their own; a masked autoencoder sees a quarter."""
KEYS = ("key", "k_proj")
"""What transformers' ViTs call the projection to keys, the second since version 5."""


@dataclass(frozen=True, kw_only=True)
class Vit:
    """A vision transformer whose attention's keys tell the structure of a picture, as DINO's do."""

    name: str
    model: Any
    processor: Any
    layer: nn.Module
    """The last block's projection to keys."""
    batch: int = MetricsConfig.batch

    @classmethod
    def open(
        cls, path_or_hub_id: PathLike, *, device: str | torch.device = "cpu", batch: int = MetricsConfig.batch
    ) -> Vit:
        """Raises InputError for what is no ViT's directory or hub id, and where files are missing or corrupt."""
        path = resolve(path_or_hub_id, network=True)
        size = _input_size(path)
        model = load_network(AutoModel, path, device=device, spare="pooler")  # DINO has none
        layer = [module for name, module in model.named_modules() if name.split(".")[-1] in KEYS][-1]
        processor = load_processor(path, size)
        return cls(name=str(path_or_hub_id), model=model, processor=processor, layer=layer, batch=batch)

    @torch.no_grad()
    def keys(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 (f, H, W, 3) → keys of the last block (f, tokens, width), all heads together."""
        found: list[Tensor] = []
        hook = self.layer.register_forward_hook(lambda _layer, _given, keys: found.append(keys))
        try:
            given = self.processor(images=list(frames), return_tensors="pt", input_data_format="channels_last")
            self.model(pixel_values=given["pixel_values"].to(self.model.device))
        finally:
            hook.remove()
        return found[0]


def _input_size(path: Path) -> int:
    """Pixels of a side; raises InputError for a network of another kind."""
    config = read_object(path / "config.json")
    kind, size = config.get("model_type"), config.get("image_size")
    if kind not in KINDS or not isinstance(size, int):
        raise InputError(f"{path} is no ViT: its config.json says model_type {kind!r}, not {' or '.join(KINDS)}")
    return size


def structure_distance(edit: np.ndarray, source: np.ndarray, vit: Vit) -> float:
    """Mean squared difference of the self-similarities of edit and source, both uint8 (f, H, W, 3); 0: the same layout.

    A self-similarity is the cosines of all pairs of a frame's keys of the last layer (Tumanyan et al. 2022, arXiv
    2201.00424, with DINO's ViT-B/8); the mean of frames is taken.
    """
    distances: list[Tensor] = []
    for first in range(0, len(edit), vit.batch):
        made, given = (_self_similarity(vit.keys(frames[first : first + vit.batch])) for frames in (edit, source))
        distances.append((made - given).square().mean((1, 2)))
    return float(torch.cat(distances).mean())


def _self_similarity(keys: Tensor) -> Tensor:  # f n c → f n n
    unit = functional.normalize(keys, dim=-1)
    return unit @ unit.transpose(1, 2)
