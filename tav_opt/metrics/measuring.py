"""All metrics of an edit, by networks that are opened once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tav_opt.config import InputError, MetricsConfig, PathLike, documented
from tav_opt.device import usable_device
from tav_opt.metrics import background, clip_scores
from tav_opt.metrics.clip_encoder import ClipEncoder, open_encoder
from tav_opt.metrics.edited import Edited
from tav_opt.metrics.embeddings import image_embeddings
from tav_opt.metrics.left_out import LeftOut
from tav_opt.metrics.motion_fidelity import motion_fidelity
from tav_opt.metrics.structure_distance import Vit, structure_distance
from tav_opt.metrics.warping_error import warping_error


@documented
@dataclass(frozen=True, kw_only=True)
class Measured:
    """The metrics of an edit."""

    networks: dict[str, str]
    """What measured: the encoder, and PickScore's and DINO's networks where they were given."""
    values: dict[str, float]
    """By the metrics' names; none is NaN or infinite."""
    left_out: dict[str, str]
    """The metrics that have no figure, and why."""

    def to_json(self) -> dict[str, Any]:
        """As `tav-opt metrics --json` writes it."""
        return {"networks": self.networks, "metrics": self.values, "left_out": self.left_out}


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What edits are measured with."""

    clip: ClipEncoder
    pick_score: ClipEncoder | None
    dino: Vit | None
    device: torch.device

    @classmethod
    def open(cls, config: MetricsConfig) -> Networks:
        """Raises InputError for a device or a network that cannot be had."""
        device = usable_device(config.device)
        options: dict[str, Any] = {"device": device, "batch": config.batch}
        return cls(
            pick_score=ClipEncoder.open(config.pick_score, **options) if config.pick_score is not None else None,
            dino=Vit.open(config.dino, **options) if config.dino is not None else None,
            clip=open_encoder(config, device),
            device=device,
        )

    @property
    def names(self) -> dict[str, str]:
        """What every result says of them."""
        given = {"encoder": self.clip, "PickScore": self.pick_score, "DINO": self.dino}
        return {role: network.name for role, network in given.items() if network is not None}


def measure(edited: Edited, networks: Networks, beside: PathLike | None = None) -> Measured:
    """All metrics of an edit; embeddings are kept in files beside it, at `beside`, where one is given.

    Raises InputError for a prompt that is too long for a network, before anything else is computed, and for a metric
    that comes out as NaN or infinite.
    """
    asked = _Asked(edited, networks, beside)
    values: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, metric in asked.metrics().items():
        try:
            value = metric()
        except LeftOut as reason:
            left_out[name] = str(reason)
            continue
        if not math.isfinite(value):
            raise InputError(f"{name} is {value}: the weights of what measures it are broken")
        values[name] = value
    return Measured(networks=networks.names, values=values, left_out=left_out)


class _Asked:
    """One edit before the networks: what several metrics need is computed once."""

    def __init__(self, edited: Edited, networks: Networks, beside: PathLike | None) -> None:
        self._edited, self._networks, self._beside = edited, networks, beside
        prompts = [text for text in (edited.prompt, edited.source_prompt) if text is not None]
        self._texts = networks.clip.embed_texts(prompts)
        self._liked = networks.pick_score.embed_texts(edited.prompt)[0] if networks.pick_score else None

    @cached_property
    def _images(self) -> Tensor:
        return image_embeddings(self._networks.clip, self._edited.frames, self._beside)

    def metrics(self) -> dict[str, Callable[[], float]]:
        """Each by its name, in the order of the table."""
        frames, source = self._edited.frames, self._edited.source
        return {
            "frame consistency": lambda: clip_scores.frame_consistency(self._images),
            "textual alignment": lambda: clip_scores.textual_alignment(self._images, self._texts[0]),
            "frame accuracy": self._frame_accuracy,
            "PickScore": self._pick_score,
            "warping error": lambda: warping_error(frames, source),
            "motion fidelity": lambda: motion_fidelity(frames, source),
            "structure distance": self._structure_distance,
            "background PSNR": lambda: background.background_psnr(frames, source, self._mask),
            "background SSIM": lambda: background.background_ssim(frames, source, self._mask),
            "background LPIPS": lambda: background.background_lpips(frames, source, self._mask, self._networks.device),
        }

    def _frame_accuracy(self) -> float:
        if len(self._texts) < 2:
            raise LeftOut("no source prompt is given")
        return clip_scores.frame_accuracy(self._images, self._texts[0], self._texts[1])

    def _pick_score(self) -> float:
        encoder = self._networks.pick_score
        if encoder is None or self._liked is None:
            raise LeftOut("no PickScore network is given")
        images = image_embeddings(encoder, self._edited.frames, self._beside)
        return clip_scores.pick_score(images, self._liked, encoder.scale)

    def _structure_distance(self) -> float:
        if self._networks.dino is None:
            raise LeftOut("no DINO network is given")
        return structure_distance(self._edited.frames, self._edited.source, self._networks.dino)

    @property
    def _mask(self) -> np.ndarray:
        if self._edited.mask is None:
            raise LeftOut("no mask is given")
        return self._edited.mask
