"""What the demo's edits are judged by: its own dual encoder and locator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from tav_opt.config import InputError
from tav_opt.demo.locator import Locator
from tav_opt.demo.training import to_unit
from tav_opt.metrics.clip_encoder import ClipEncoder


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The demo's dual encoder (not CLIP: it knows the demo's world alone) and its locator."""

    encoder: ClipEncoder
    locator: Locator

    @classmethod
    def open(cls, package: Path = Path(__file__).parent) -> Judge:
        """Reads `clip_model/` and `locator/`; raises InputError where they are not there yet."""
        for part in ("clip_model", "locator"):
            if not (package / part).is_dir():
                raise InputError(f"{package / part} does not exist: python -m tav_opt.demo.train makes it")
        locator = Locator()
        locator.load_state_dict(load_file(package / "locator" / "model.safetensors"))
        return cls(encoder=ClipEncoder.open(package / "clip_model"), locator=locator)

    def classify(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """For each picture the position of the text nearest to it."""
        return (self.encoder.embed_images(images) @ self.encoder.embed_texts(texts).T).argmax(1).numpy()

    @torch.no_grad()
    def track(self, frames: np.ndarray) -> np.ndarray:
        """The subject's middle in each frame (f, 2), x and y in pixels."""
        return self.locator(to_unit(frames)).numpy()


def track_correlation(track: np.ndarray, source: np.ndarray) -> float:
    """Pearson's correlation of two tracks (f, 2), each about its own mean, both coordinates together."""
    a, b = (x - x.mean(0) for x in (track, source))
    return float((a * b).sum() / max(np.sqrt((a**2).sum() * (b**2).sum()), 1e-9))


def frame_difference(frames: np.ndarray, where: np.ndarray | None = None) -> float:
    """Mean absolute difference of neighbouring frames uint8 (f, H, W, 3), of 255, over pixels `where` (f-1, H, W)."""
    differences = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(-1)
    return float(differences.mean() if where is None else differences[where].mean())


def outside(track: np.ndarray, side: float, shape: tuple[int, int]) -> np.ndarray:
    """Pixels (f-1, H, W) of neighbouring frames outside a square of that side about the subject's middle."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    far = np.maximum(abs(x[None] - track[:, 0, None, None]), abs(y[None] - track[:, 1, None, None])) > side / 2
    return far[1:] & far[:-1]
