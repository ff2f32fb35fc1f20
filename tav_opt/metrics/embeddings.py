"""Embeddings of frames, kept in a file beside the edit: a second measurement need not compute them again."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tav_opt.checkpoint import save_tensors
from tav_opt.config import InputError, PathLike
from tav_opt.metrics.clip_encoder import ClipEncoder

_NAME = "frames"
"""Of the tensor in the file."""
_log = logging.getLogger(__name__)


def image_embeddings(encoder: ClipEncoder, frames: np.ndarray, beside: PathLike | None = None) -> Tensor:
    """Unit vectors (f, width) of frames uint8 (f, H, W, 3), from the file beside the edit if they are in it.

    The file is named for the edit and the encoder, `edit.mp4.1f2e3d4c.safetensors`, and holds for these frames and this
    encoder alone: it has the SHA-256 of both. Where it cannot be written a warning says so.
    """
    if beside is None:
        return encoder.embed_images(frames)
    file = Path(beside).with_name(f"{Path(beside).name}.{encoder.hash[:8]}.safetensors")
    of = {"frames": _hash(frames), "encoder": encoder.hash}
    if (kept := _kept(file, of)) is not None:
        return kept
    embedded = encoder.embed_images(frames)
    try:
        save_tensors({_NAME: embedded.contiguous()}, file, of)
    except InputError as error:  # a folder without rights, a full disk: the figures are there all the same
        _log.warning("embeddings are not kept: %s", error)
    return embedded


def _hash(frames: np.ndarray) -> str:
    digest = hashlib.sha256(str(frames.shape).encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.hexdigest()


def _kept(file: Path, of: dict[str, str]) -> Tensor | None:
    """What the file has of these frames and this encoder; None for one of others, and for one that is broken."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as found:
            kept = found.get_tensor(_NAME) if found.metadata() == of else None
    except SafetensorError:
        return None
    return kept if kept is not None and kept.isfinite().all() else None
