"""Captions by an image-captioning model, "off the shelf" as the paper has them (section 4.1: BLIP-2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tav_opt.base.directory import resolve
from tav_opt.config import InputError, first_line
from tav_opt.metrics.networks import load_network

TOKENS = 30
"""Of a caption at most: with the special ones CLIP reads 77."""


@dataclass(frozen=True, kw_only=True)
class Captioner:
    """A captioning model of transformers (BLIP, BLIP-2, GIT, …): a directory or a hub id."""

    name: str
    model: Any
    processor: Any

    @classmethod
    def open(cls, path_or_hub_id: str, device: torch.device) -> Captioner:
        """Raises InputError for what is no such model, and where files are missing or corrupt."""
        path = resolve(path_or_hub_id, network=True)
        model = load_network(AutoModelForImageTextToText, path, device=device)
        try:
            processor = AutoProcessor.from_pretrained(path)  # nosec B615  # a local folder
        except Exception as error:  # of many kinds
            raise InputError(f"{path} has no processor that can be read: {first_line(error)}") from None
        return cls(name=path_or_hub_id, model=model, processor=processor)

    @torch.no_grad()
    def caption(self, frames: np.ndarray) -> str:
        """Frames uint8 (f, H, W, 3) → what the middle one shows; raises InputError where the model says nothing."""
        given = self.processor(images=frames[len(frames) // 2], return_tensors="pt").to(self.model.device)
        ids = self.model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
        said = self.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        if not said:
            raise InputError(f"captioner {self.name} says nothing of the video: give it a caption")
        return said
