"""What an edit leaves as it was: pictures compared where a mask keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tav_opt.metrics.left_out import LeftOut, library

SAME = 100.0
"""dB of pictures that are equal, whose ratio is infinite: JSON and means have no infinity."""
SSIM_LEAST = 11
LPIPS_LEAST = 32
"""Pixels of a side that SSIM's window, and SqueezeNet, need."""
BATCH = 8


def background_psnr(edit: np.ndarray, source: np.ndarray, mask: np.ndarray) -> float:
    """Peak signal-to-noise ratio of the backgrounds in dB, a mean of frames; 100 where they are equal.

    Edit and source uint8 (f, H, W, 3), mask bool (1 or f, H, W), true where the picture may change. As image-editing
    benchmarks have it (PIE-Bench, Ju et al. 2023, arXiv 2310.01506): what may change is black in both
    pictures and counts as equal, so that figures compare under the same mask alone. By torchmetrics; so are
    `background_ssim` and `background_lpips`. Raises LeftOut where it is not installed.
    """
    ratio = library("torchmetrics.functional.image", "torchmetrics").peak_signal_noise_ratio
    return _mean(
        lambda made, given: ratio(made, given, data_range=1.0, dim=(1, 2, 3), reduction="none").clamp(max=SAME),
        _backgrounds(edit, source, mask),
    )


def background_ssim(edit: np.ndarray, source: np.ndarray, mask: np.ndarray) -> float:
    """Structural similarity of the backgrounds, a mean of frames; 1: equal.

    Wang et al. 2004, Gaussian window of 11 pixels, mirrored at the borders, of the same pictures as `background_psnr`.
    Raises LeftOut for frames below 11 pixels.
    """
    _check_size(edit, SSIM_LEAST)
    similarity = library("torchmetrics.functional.image", "torchmetrics").structural_similarity_index_measure
    return _mean(
        lambda made, given: similarity(made, given, data_range=1.0, reduction="none").reshape(-1),
        _backgrounds(edit, source, mask),
    )


def background_lpips(
    edit: np.ndarray, source: np.ndarray, mask: np.ndarray, device: str | torch.device = "cpu"
) -> float:
    """Learned perceptual distance of the backgrounds, a mean of frames; 0: equal.

    Zhang et al. 2018 (arXiv 1801.03924) by SqueezeNet's features, as PIE-Bench has it, of the same pictures as
    `background_psnr`. Raises LeftOut where torchvision or SqueezeNet's weights are not there, and for frames below 32
    pixels.
    """
    _check_size(edit, LPIPS_LEAST)
    network = _perceptual().to(device)
    for made, given in _backgrounds(edit, source, mask):
        network.update(made.to(device), given.to(device))
    return float(network.compute())


def _perceptual() -> Any:
    """LPIPS of torchmetrics, which has its linear layers; SqueezeNet's weights are in torch's cache or nowhere."""
    module = library("torchmetrics.image.lpip", "torchmetrics")
    perceptual_weights()
    return module.LearnedPerceptualImagePatchSimilarity(net_type="squeeze", normalize=True)


def perceptual_weights() -> Path:
    """SqueezeNet's file in torch's cache; raises LeftOut where it, or torchvision, which names it, is not there."""
    url = library("torchvision.models", "torchvision", "torchvision").SqueezeNet1_1_Weights.DEFAULT.url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.is_file():
        raise LeftOut(f"needs {file}, which does not exist: fetch {url}, or set TORCH_HOME")
    return file


def _check_size(frames: np.ndarray, least: int) -> None:
    if min(frames.shape[1:3]) < least:
        raise LeftOut(f"needs frames of {least}×{least} or more, not {frames.shape[2]}×{frames.shape[1]}")


def _backgrounds(edit: np.ndarray, source: np.ndarray, mask: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Some frames of edit and source at a time, (frames, 3, H, W) in 0…1, black where the mask is true.

    Frames that may change all over do not count: they would be equal.
    """
    keep = np.broadcast_to(~mask, edit.shape[:3])
    some = keep.any((1, 2))
    edit, source, keep = edit[some], source[some], keep[some][..., None]
    for first in range(0, len(edit), BATCH):
        part = slice(first, first + BATCH)
        made, given = (
            torch.from_numpy(frames[part] * keep[part]).permute(0, 3, 1, 2).float() / 255 for frames in (edit, source)
        )
        yield made, given


def _mean(measure: Callable[[Tensor, Tensor], Tensor], parts: Iterator[tuple[Tensor, Tensor]]) -> float:
    return float(torch.cat([measure(made, given) for made, given in parts]).double().mean())
