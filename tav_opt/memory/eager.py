"""What tuning and editing need in memory, by a count of values, against what is free."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from diffusers.models.transformers import Transformer2DModel
from torch import nn

from tav_opt.config import InputError, TrainConfig
from tav_opt.memory.control_networks import network_bytes
from tav_opt.memory.free import free_bytes
from tav_opt.models import StableDiffusion
from tav_opt.tuning_step import compute_dtype
from tav_opt.unet import VideoResnetBlock, VideoUNet, trained_names

# Kept for backward, in values per value of a module's input: counted with autograd's saved_tensors_hooks.
_RESNET, _TRANSFORMER = 6, 32
_VAE_ENCODE, _VAE_DECODE = 6, 13
"""Tensors of the VAE's first width at the clip's full size that live at once, measured."""
_FORWARD = 16
"""Values per value of its input that the largest part holds at once without backward: its feed-forward, and copies."""
_LIBRARIES = 128 * 2**20
"""What the first step loads and compiles."""
_log = logging.getLogger(__name__)


def estimate_tuning(sd: StableDiffusion, config: TrainConfig, frames: int, height: int, width: int) -> int:
    """Bytes that tuning will need at its peak, the loaded model included (frames of height × width pixels).

    Gradient checkpointing that nobody has decided on counts as off.
    """
    dtype = compute_dtype(sd.unet, config)
    weights = sum(_bytes(part) for part in (sd.vae, sd.text_encoder)) + _values(sd.unet) * dtype.itemsize
    own = dict(sd.unet.named_parameters())
    trained = sum(own[name].numel() for name in trained_names(sd.unet, config.trainable))
    # fp32: gradient, two moments, and the copy that clipping and saving make; beside halves masters and own gradients.
    training = trained * (4 * 4 + (4 + dtype.itemsize if dtype != torch.float32 else 0))
    latent_pixels = frames * height * width // sd.vae_factor**2
    activations = _activations(sd.unet, latent_pixels, bool(config.gradient_checkpointing)) * dtype.itemsize
    vae = _vae(sd, _VAE_DECODE if config.preview_every else _VAE_ENCODE, frames, height, width)
    return weights + _LIBRARIES + max(training + activations, vae)


def estimate_editing(sd: StableDiffusion, frames: int, height: int, width: int, rows: int = 2) -> int:
    """Bytes that a guided edit of one prompt will need at its peak, the loaded model included.

    `rows` go through the network at a time: without and with the prompt, and its source where that is beside it.
    """
    model = sum(_bytes(part) for part in (sd.unet, sd.vae, sd.text_encoder))
    return model + working_bytes(sd, frames, height, width, rows)


def working_bytes(sd: StableDiffusion, frames: int, height: int, width: int, rows: int = 2) -> int:
    """Bytes that a guided edit of one prompt will need at its peak beyond the loaded model."""
    sizes = [size for size, _ in _parts(sd.unet, rows * frames * height * width // sd.vae_factor**2)]
    unet = (
        sum(sizes[: len(sizes) // 2]) + _FORWARD * max(sizes)
    ) * sd.unet.dtype.itemsize  # skips, and the present part
    return _LIBRARIES + max(unet, _vae(sd, _VAE_DECODE, frames, height, width))


def _vae(sd: StableDiffusion, live: int, frames: int, height: int, width: int) -> int:
    widest = int(sd.vae.config.block_out_channels[0])
    return live * min(frames, 8) * height * width * widest * sd.vae.dtype.itemsize


def _activations(unet: VideoUNet, latent_pixels: int, gradient_checkpointing: bool) -> int:
    """Values kept for backward (under checkpointing the inputs of parts), and three times what the largest part keeps.

    Those are the part recomputed, its gradients, and what attention makes again in its backward.
    """
    parts = list(_parts(unet, latent_pixels))
    kept = sum(size if gradient_checkpointing else size * factor for size, factor in parts)
    return kept + 3 * max(size * factor for size, factor in parts)


def _parts(unet: VideoUNet, latent_pixels: int) -> Iterator[tuple[int, int]]:
    """Per resnet and transformer: values of its input, and how many times as many it keeps."""
    levels = len(unet.down_blocks)
    depths = [(block, depth) for depth, block in enumerate(unet.down_blocks)]
    depths += [(unet.mid_block, levels - 1)]
    depths += [(block, levels - 1 - depth) for depth, block in enumerate(unet.up_blocks)]
    for block, depth in depths:
        pixels = latent_pixels // 4**depth
        for module in block.modules():
            if isinstance(module, VideoResnetBlock):
                yield (module.in_channels + module.out_channels) // 2 * pixels, _RESNET
            elif isinstance(module, Transformer2DModel):
                yield module.in_channels * pixels * len(module.transformer_blocks), _TRANSFORMER


def _values(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def fit_tuning(sd: StableDiffusion, config: TrainConfig, frames: int, height: int, width: int) -> TrainConfig:
    """The configuration with gradient checkpointing decided: unless told, on exactly where tuning fits with it alone.

    Raises InputError when tuning needs more memory than the device has free, saying what would need less.
    """
    free = free_bytes(sd.unet.device) + sum(_bytes(part) for part in (sd.unet, sd.vae, sd.text_encoder))
    told = config.gradient_checkpointing
    choices = [replace(config, gradient_checkpointing=on) for on in ((False, True) if told is None else (told,))]
    needed = [estimate_tuning(sd, choice, frames, height, width) for choice in choices]
    has = f"{sd.unet.device.type} has {free / 2**30:.1f} GiB"
    fitting = [choice for choice, size in zip(choices, needed, strict=True) if size <= free]
    if not fitting:
        hint = "gradient checkpointing or fewer frames" if told is False else "fewer frames or a smaller size"
        most = "" if told is False else " with gradient checkpointing"
        size = f"{needed[-1] / 2**30:.1f} GiB{most}"
        raise InputError(f"tuning {frames} frames of {width}×{height} needs about {size}, {has}: try {hint}")
    if len(fitting) < len(choices):
        _log.warning("gradient checkpointing is on: without it tuning needs about %.1f GiB, %s", needed[0] / 2**30, has)
    return fitting[0]


def check_editing(
    sd: StableDiffusion, frames: int, height: int, width: int, rows: int = 2, networks: Sequence[nn.Module] = ()
) -> None:
    """Raises InputError when an edit, which may follow maps by loaded `networks`, needs more than the device has."""
    needed = estimate_editing(sd, frames, height, width, rows)
    needed += sum(network_bytes(one, frames, height, width, sd.vae_factor, rows) for one in networks)
    loaded = (sd.unet, sd.vae, sd.text_encoder, *networks)
    free = free_bytes(sd.unet.device) + sum(_bytes(part) for part in loaded)
    if needed > free:
        following = f" by {len(networks)} networks that follow maps" if networks else ""
        raise InputError(
            f"editing {frames} frames of {width}×{height}{following} needs about {needed / 2**30:.1f} GiB, "
            f"{sd.unet.device.type} has {free / 2**30:.1f} GiB: try fewer frames or a smaller size"
        )
