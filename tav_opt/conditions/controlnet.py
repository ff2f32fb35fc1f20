"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a copy of the UNet's encoder that looks at maps, once a step."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tav_opt.base import weights
from tav_opt.conditions.condition import DOWN, HINT, MID
from tav_opt.conditions.network_files import check_same, filled, settings_of
from tav_opt.config import InputError, first_line
from tav_opt.files import write_json

if TYPE_CHECKING:
    from diffusers import ControlNetModel  # whose import brings every kind of ControlNet: a quarter of a second

_SAME = ("in_channels", "block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim")
"""Settings in which a ControlNet is like the UNet that it was copied from."""


class Hint(nn.Module):
    """What a ControlNet sees of its maps, by convolutions down to the latents' size: they know nothing of the step."""

    names = (HINT,)

    def __init__(self, net: ControlNetModel) -> None:
        super().__init__()
        self.embedding = net.controlnet_cond_embedding
        self._bgr = net.config.controlnet_conditioning_channel_order == "bgr"

    def forward(self, maps: Tensor) -> tuple[Tensor]:
        """maps (n,3,H,W) in 0…1 → (n,c',h,w), to be added to what the first convolution makes of latents (n,c,h,w)."""
        maps = maps.to(self.embedding.conv_in.weight.dtype)
        return (self.embedding(maps.flip(1) if self._bgr else maps),)


class ControlNetFrames(nn.Module):
    """A ControlNet as a function of frames: what is exported, and what eager PyTorch runs.

    `hint` is apart: maps stay the same while latents change from step to step.
    """

    def __init__(self, net: ControlNetModel) -> None:
        super().__init__()
        self.hint, self.net = Hint(net), net
        net.controlnet_cond_embedding = nn.Identity()  # which is given the hint
        net.register_to_config(controlnet_conditioning_channel_order="rgb")  # as it is: no order of channels

    @property
    def names(self) -> tuple[str, ...]:
        return (*(f"{DOWN}.{number}" for number in range(len(self.net.controlnet_down_blocks))), MID)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, hint: Tensor) -> tuple[Tensor, ...]:
        """latents (n,c,h,w), timestep (n,), text (n,tokens,width), hint (n,c',h,w) → residuals (n,c',h',w')."""
        dtype = self.net.conv_in.weight.dtype
        latents, text, hint = (x.to(dtype) for x in (latents, text, hint))
        down, mid = self.net(latents, timestep, text, hint, return_dict=False)
        return (*down, mid)


def load(path: Path, unet: Mapping[str, Any], vae_factor: int) -> ControlNetFrames:
    """A ControlNet of a directory or a single file for a UNet of this configuration, on the processor in float32.

    Raises InputError where it is none, or one for another base, naming the setting.
    """
    from diffusers import ControlNetModel

    config = settings_of(path, ControlNetModel.__name__)
    if config is None:
        net = _of_single_file(path, unet)
    else:
        check_same(path, config, unet, _SAME)
        if config.get("global_pool_conditions"):
            raise InputError(f"{path}: global_pool_conditions is not supported: it leaves out the text's other half")
        net = filled(ControlNetModel, config, path)
    _check_maps(path, net.config, vae_factor)
    return ControlNetFrames(net.float().eval().requires_grad_(False))


def _check_maps(path: Path, config: Mapping[str, Any], vae_factor: int) -> None:
    """Raises InputError where it looks at pictures of another kind, or makes hints of another size than latents are."""
    if (order := config["controlnet_conditioning_channel_order"]) not in ("rgb", "bgr"):
        raise InputError(f"{path}: controlnet_conditioning_channel_order {str(order)[:60]!r} is neither rgb nor bgr")
    if (channels := config["conditioning_channels"]) != 3:
        raise InputError(f"{path}: conditioning_channels {channels!r} is not 3: maps are pictures")
    if (factor := 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)) != vae_factor:
        raise InputError(f"{path} is for another base: it halves maps to 1/{factor}, latents are 1/{vae_factor}")


def _of_single_file(path: Path, unet: Mapping[str, Any]) -> ControlNetModel:
    """By diffusers' own loader; a ControlNet has the architecture of the UNet that it is for, which no file tells."""
    from diffusers import ControlNetModel

    taken = signature(ControlNetModel.__init__).parameters
    tensors = weights.load_single(path)
    with tempfile.TemporaryDirectory() as folder, torch.device("cpu"):
        settings = {name: value for name, value in unet.items() if name in taken and not name.endswith("_type")}
        write_json(Path(folder) / "config.json", settings | {"_class_name": ControlNetModel.__name__})
        try:
            net = ControlNetModel.from_single_file(dict(tensors), config=folder, local_files_only=True)
        except Exception as error:  # of as many kinds as there are ways not to fit
            raise InputError(f"{path} is no ControlNet for this base: {first_line(error)}") from None
    lacking = [name for name, value in net.named_parameters() if value.is_meta]
    if lacking or sum(x.numel() for x in tensors.values()) != sum(x.numel() for x in net.parameters()):
        raise InputError(f"{path} is no ControlNet for this base: {(lacking or ['its values'])[0]} do not fit")
    return net
