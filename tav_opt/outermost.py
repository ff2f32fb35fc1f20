"""The outermost layers of a UNet, and all below them, whose answer changes little from step to step (DeepCache, Ma et
al. 2023, arXiv 2312.00858, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

LAYERS = 2
"""Of the last block of the decoder that are outermost, with as many skips from the encoder: the first ones."""


def whole(unet: UNet2DConditionModel, x: Tensor, timesteps: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """x (b f) c h w, timesteps (b,), text (b,tokens,width) → what the UNet predicts, and the features (b f) c' h w that
    came to its outermost layers from below."""
    x, time = _begun(unet, x, timesteps)
    skips = [x]
    for block in unet.down_blocks:
        x, found = block(x, time, **_told(block, text))
        skips += found
    x = unet.mid_block(x, time, encoder_hidden_states=text)
    odd = any(side % 2**unet.num_upsamplers for side in skips[0].shape[-2:])
    *blocks, last = unet.up_blocks
    for block in blocks:
        own = [skips.pop() for _ in block.resnets][::-1]
        size = skips[-1].shape[2:] if odd else None
        x = block(x, tuple(own), time, upsample_size=size, **_told(block, text))
    below = len(last.resnets) - _outermost(unet)
    x = _decoded(islice(_layers(last), below), x, skips, time, text)
    return _ended(unet, _decoded(islice(_layers(last), below, None), x, skips, time, text)), x


def shallow(unet: UNet2DConditionModel, x: Tensor, timesteps: Tensor, text: Tensor, features: Tensor) -> Tensor:
    """As `whole`, with the features of another step in place of all that is below the outermost layers."""
    x, time = _begun(unet, x, timesteps)
    skips, last, outermost = [x], unet.up_blocks[-1], _outermost(unet)
    for layer in islice(_layers(unet.down_blocks[0]), outermost - 1):
        skips.append(_run(layer, skips[-1], time, text))
    layers = islice(_layers(last), len(last.resnets) - outermost, None)
    return _ended(unet, _decoded(layers, features, skips, time, text))


def _outermost(unet: UNet2DConditionModel) -> int:
    """How many layers of the last block are."""
    return min(LAYERS, len(unet.up_blocks[-1].resnets))


def channels(unet: UNet2DConditionModel) -> int:
    """Of the features: what the first of the outermost layers takes, but for its skip."""
    last, outermost = unet.up_blocks[-1], _outermost(unet)
    return int(last.resnets[-outermost].in_channels) - int(unet.config.block_out_channels[0])


def _begun(unet: UNet2DConditionModel, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """After the first convolution, and the time's embedding (b, d)."""
    x = 2 * x - 1 if unet.config.center_input_sample else x
    time = unet.time_embedding(unet.get_time_embed(x, timesteps))
    return unet.conv_in(x), time if unet.time_embed_act is None else unet.time_embed_act(time)


def _ended(unet: UNet2DConditionModel, x: Tensor) -> Tensor:
    if unet.conv_norm_out:
        x = unet.conv_act(unet.conv_norm_out(x))
    return unet.conv_out(x)


def _told(block: nn.Module, text: Tensor) -> dict[str, Any]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


def _layers(block: Any) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Each resnet with the transformer behind it, where the block has them."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, attentions, strict=True)


def _run(layer: tuple[nn.Module, nn.Module | None], x: Tensor, time: Tensor, text: Tensor) -> Tensor:
    resnet, attention = layer
    x = resnet(x, time)
    return x if attention is None else attention(x, encoder_hidden_states=text, return_dict=False)[0]


def _decoded(layers: Iterator[Any], x: Tensor, skips: list[Tensor], time: Tensor, text: Tensor) -> Tensor:
    """Through layers of the decoder, each of which takes the last of the skips."""
    for layer in layers:
        x = _run(layer, torch.cat([x, skips.pop()], 1), time, text)
    return x
