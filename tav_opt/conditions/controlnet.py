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
from tav_opt.conditions.condition import DOWN, MID
from tav_opt.conditions.network_files import check_same, filled, settings_of
from tav_opt.config import InputError, first_line
from tav_opt.files import write_json

if TYPE_CHECKING:
    from diffusers import ControlNetModel  # whose import brings every kind of ControlNet: a quarter of a second

_SAME = ("in_channels", "block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim")
"""Settings in which a ControlNet is like the UNet that it was copied from."""


class ControlNetFrames(nn.Module):
    """A ControlNet as a function of frames: what is exported, and what eager PyTorch runs."""

    def __init__(self, net: ControlNetModel) -> None:
        super().__init__()
        self.net = net

    @property
    def names(self) -> tuple[str, ...]:
        return (*(f"{DOWN}.{number}" for number in range(len(self.net.controlnet_down_blocks))), MID)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, maps: Tensor) -> tuple[Tensor, ...]:
        """latents (n,c,h,w), timestep (n,), text (n,tokens,width), maps (n,3,H,W) in 0…1 → residuals (n,c',h',w')."""
        dtype = self.net.conv_in.weight.dtype
        latents, text, maps = (x.to(dtype) for x in (latents, text, maps))
        down, mid = self.net(latents, timestep, text, maps, return_dict=False)
        return (*down, mid)


def load(path: Path, unet: Mapping[str, Any]) -> ControlNetFrames:
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
    return ControlNetFrames(net.float().eval().requires_grad_(False))


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
