"""CLIP's two towers: pictures and texts as unit vectors of one space (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, CLIPModel

from tav_opt.base import weights
from tav_opt.base.directory import resolve
from tav_opt.config import CLIP, InputError, MetricsConfig, PathLike, first_line
from tav_opt.files import read_object, sha256
from tav_opt.metrics.networks import PROCESSORS, load_network, load_processor
from tav_opt.models import tokenize

DEMO = Path(__file__).parents[1] / "demo" / "clip_model"
DEMO_NAME = "the demo's own encoder (64×64, knows the demo's world alone, not CLIP)"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClipEncoder:
    """A CLIP of transformers, of whatever size or weights."""

    name: str
    """What every result calls it."""
    path: Path
    model: Any
    tokenizer: Any
    processor: Any
    batch: int = MetricsConfig.batch
    """Frames that go through it at a time."""

    @classmethod
    def open(
        cls, path_or_hub_id: PathLike, *, device: str | torch.device = "cpu", batch: int = MetricsConfig.batch
    ) -> ClipEncoder:
        """Raises InputError for what is no CLIPModel's directory or hub id, and where files are missing or corrupt."""
        path = resolve(path_or_hub_id, network=True)
        kind = read_object(path / "config.json").get("model_type")
        if kind != "clip":
            raise InputError(f"{path_or_hub_id} is no CLIP: its config.json says model_type {kind!r}, not 'clip'")
        model = load_network(CLIPModel, path, device=device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)  # nosec B615  # a local folder
        except Exception as error:  # of many kinds
            raise InputError(f"{path} has no tokenizer that can be read: {first_line(error)}") from None
        longest = model.config.text_config.max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)  # where it is silent: 10^30
        return cls(
            name=network_name(path_or_hub_id, path),
            path=path,
            model=model,
            tokenizer=tokenizer,
            processor=load_processor(path, model.config.vision_config.image_size),
            batch=batch,
        )

    @cached_property
    def hash(self) -> str:
        """SHA-256 over what embeddings of pictures depend on: weights, configuration, processor."""
        return network_hash(self.path)

    @property
    def scale(self) -> float:
        """What cosines are multiplied by: the network's own temperature (100 for OpenAI's)."""
        return float(self.model.logit_scale.exp())

    @torch.no_grad()
    def embed_images(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 (f, H, W, 3) → unit vectors (f, width) on the processor; raises InputError for NaN."""
        parts = [frames[first : first + self.batch] for first in range(0, len(frames), self.batch)]
        return torch.cat([self._unit(self._embed_part(part), "a frame") for part in parts])

    def _embed_part(self, frames: np.ndarray) -> Any:
        given = self.processor(images=list(frames), return_tensors="pt", input_data_format="channels_last")
        return self.model.get_image_features(pixel_values=given["pixel_values"].to(self.model.device))

    @torch.no_grad()
    def embed_texts(self, texts: str | Sequence[str]) -> Tensor:
        """Texts → unit vectors (texts, width); raises InputError for one that is too long, and for NaN."""
        ids = tokenize(self.tokenizer, texts).to(self.model.device)
        return self._unit(self.model.get_text_features(input_ids=ids), "a text")

    def _unit(self, found: Any, what: str) -> Tensor:
        """transformers gives the embeddings, or since version 5 an object that has them."""
        embedded = found if isinstance(found, Tensor) else found.pooler_output
        unit = functional.normalize(embedded.float(), dim=-1).cpu()
        if not unit.isfinite().all():
            raise InputError(f"{self.name}: the embedding of {what} is NaN or infinite: its weights are broken")
        return unit


def network_name(path_or_hub_id: PathLike, path: Path) -> str:
    """What results call the network that lies at a path, as it was asked for."""
    return DEMO_NAME if path.resolve() == DEMO else str(path_or_hub_id)


def network_hash(path: Path) -> str:
    """SHA-256 over the weights, the configuration and the processor of a network's directory."""
    described = [path / name for name in ("config.json", *PROCESSORS)]
    files = [file for file in described if file.is_file()] + weights.files(path)
    return hashlib.sha256("\n".join(f"{file.name} {sha256(file)}" for file in files).encode()).hexdigest()


def open_encoder(config: MetricsConfig, device: str | torch.device = "cpu") -> ClipEncoder:
    """The CLIP that is asked for; else OpenAI's, or the demo's own encoder where that is not to be had, named so."""
    return ClipEncoder.open(config.clip or chosen_encoder(), device=device, batch=config.batch)


def chosen_encoder() -> str:
    """Of those who ask for none: OpenAI's, or, which is said, the demo's own where that is not to be had."""
    try:
        resolve(CLIP, network=True)
    except InputError as error:
        _log.warning("%s: measured with %s instead", error, DEMO_NAME)
        return str(DEMO)
    return CLIP
