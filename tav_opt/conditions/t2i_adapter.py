"""T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): features of maps, once an edit, added at the end of each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import T2IAdapter
from torch import Tensor, nn

from tav_opt.conditions.condition import INSIDE
from tav_opt.conditions.network_files import check_same, filled, settings_of
from tav_opt.config import InputError

KINDS = ("full_adapter", "light_adapter", "full_adapter_xl")
"""The last is for UNets like SDXL's, whose first block is the one without attention, not the last."""
XL, XL_BLOCKS = KINDS[2], 3


class AdapterFrames(nn.Module):
    """An adapter as a function of frames: what is exported, and what eager PyTorch runs."""

    def __init__(self, net: T2IAdapter) -> None:
        super().__init__()
        self.net = net

    @property
    def names(self) -> tuple[str, ...]:
        light = self.net.config.adapter_type == "light_adapter"  # whose last block has the width of the one before
        return tuple(f"{INSIDE}.{number}" for number in range(len(self.net.config.channels) + light))

    def forward(self, maps: Tensor) -> tuple[Tensor, ...]:
        """maps (n,3,H,W) in 0…1 → features (n,c',h',w'); one that was trained on grey maps gets grey ones."""
        maps = maps.to(next(self.parameters()).dtype)
        return tuple(self.net(maps.mean(1, keepdim=True) if self.net.config.in_channels == 1 else maps))


def load(path: Path, unet: Mapping[str, Any], vae_factor: int) -> AdapterFrames:
    """An adapter of a directory for a UNet of this configuration, on the processor in float32.

    Raises InputError where it is none, or one for another base, naming the setting.
    """
    config = settings_of(path, T2IAdapter.__name__)
    if config is None:
        raise InputError(
            f"{path} is a single file, which does not tell an adapter's kind: give a directory of diffusers"
        )
    kind, widths = config.get("adapter_type"), [*unet.get("block_out_channels", ())]
    _check_kind(path, str(kind), [str(block) for block in unet.get("down_block_types", ())])
    light = kind == "light_adapter" and widths[-1:] == widths[-2:-1]
    # The first two features of SDXL's kind have one size, that of what leaves the block without attention.
    factor = 2 * vae_factor if kind == XL else vae_factor
    like = {"channels": widths[:-1] if light else widths, "downscale_factor": factor}
    check_same(path, config, like, tuple(like))
    if config.get("in_channels") not in (1, 3):
        raise InputError(f"{path}: in_channels {config.get('in_channels')!r} is not 1 or 3: maps are pictures")
    return AdapterFrames(filled(T2IAdapter, config, path).float().eval().requires_grad_(False))


def _check_kind(path: Path, kind: str, blocks: Sequence[str]) -> None:
    """Raises InputError for an adapter whose features have other sizes than what they are added to."""
    if kind not in KINDS:
        raise InputError(f"{path}: adapter_type {kind[:60]!r} is none of {', '.join(KINDS)}")
    without = {number for number, block in enumerate(blocks) if "CrossAttn" not in block}
    if kind == XL and (without != {0} or len(blocks) != XL_BLOCKS):
        raise InputError(f"{path}: a {kind} is for UNets of {XL_BLOCKS} blocks, the first without attention")
    if kind != XL and not without <= {len(blocks) - 1}:
        raise InputError(f"{path}: a {kind} is for UNets with attention in all blocks but the last")
