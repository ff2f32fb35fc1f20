"""What could be saved in projections: `python benchmarks/text_keys.py --help`.

The text's keys and values are the same at every step of an edit. Counted: their share of a guided step's floating-point
operations. Timed: their share of a step of the demo's model on a processor; and queries, keys and values of frames by
one product in place of three.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from common import header, machine
from diffusers import UNet2DConditionModel
from presets import DEMO_MODEL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tav_opt import command, models
from tav_opt.files import write_json
from tav_opt.unet import VideoUNet, inflate

TEXT = ("attn2.to_k", "attn2.to_v")
PROJECTED = ((48 * 64, 128), (48 * 16, 192), (48 * 256, 320), (48 * 64, 640))
"""Tokens and widths of two clips of 24 frames: of the demo's model, and of Stable Diffusion's at 128²."""


@dataclass(frozen=True, kw_only=True)
class TextKeys:
    """The share of a guided step that the keys and values of the text take."""

    frames: int = 24
    """Of SD 1.5's clip; the demo's has 8."""
    calls: int = 10
    """Steps that are timed."""
    out: Path = Path("benchmarks/results/text_keys.json")


def step(unet: VideoUNet, frames: int, side: int, device: str) -> Callable[[], Tensor]:
    """One guided step on latents of a side."""
    latents = torch.randn(2, unet.config.in_channels, frames, side, side, device=device)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, device=device)
    timesteps = torch.full((2,), 501, device=device)
    return lambda: unet(latents, timesteps, text)


def projections(unet: nn.Module) -> list[nn.Linear]:
    """Those of the text's keys and values."""
    found = (module for name, module in unet.named_modules() if name.endswith(TEXT))
    return [module for module in found if isinstance(module, nn.Linear)]


@torch.no_grad()
def counted_share(unet: VideoUNet, frames: int, side: int) -> float:
    """Of the operations of a step; the UNet has no memory."""
    with FlopCounterMode(display=False) as counter:
        step(unet, frames, side, "meta")()
    linear = sum(2 * 2 * 77 * module.in_features * module.out_features for module in projections(unet))
    return linear / counter.get_total_flops()


@torch.no_grad()
def timed_share(unet: VideoUNet, frames: int, side: int, calls: int) -> float:
    """Of the time of a step."""
    text = torch.randn(2, 77, unet.config.cross_attention_dim)
    return ratio(lambda: [module(text) for module in projections(unet)], step(unet, frames, side, "cpu"), calls)


@torch.no_grad()
def in_one(tokens: int, width: int, calls: int) -> float:
    """The time of one product for queries, keys and values of so many tokens, over that of three."""
    x, weights = torch.randn(tokens, width), torch.randn(3, width, width)
    whole = weights.flatten(0, 1)
    return ratio(
        lambda: F.linear(x, whole).chunk(3, -1), lambda: [F.linear(x, weight) for weight in weights], 10 * calls
    )


def ratio(one: Callable[[], Any], other: Callable[[], Any], calls: int) -> float:
    """Of the process's own seconds: medians of both, which take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(calls + 1):
        for run, times in zip((one, other), seconds, strict=True):
            start = time.process_time()
            run()
            if number:
                times.append(time.process_time() - start)
    return float(np.median(seconds[0]) / np.median(seconds[1]))


def main(config: TextKeys) -> int:
    """Counts, times, prints and saves."""
    with torch.device("meta"):
        sd15 = inflate(UNet2DConditionModel(cross_attention_dim=768))
    demo = models.load_video_unet(DEMO_MODEL)
    side = demo.config.sample_size
    found = {
        f"of a step's operations, SD 1.5, {config.frames} frames of 512²": counted_share(sd15, config.frames, 64),
        "of a step's operations, the demo's model, 8 frames of 64²": counted_share(deepcopy(demo).to("meta"), 8, side),
        "of a step's time, the demo's model, 8 frames of 64²": timed_share(demo, 8, side, config.calls),
    }
    fused = {f"{tokens} tokens of {width}": in_one(tokens, width, config.calls) for tokens, width in PROJECTED}
    print(header("keys and values of the text"))
    print(*(f"{share:.2%} {what}" for what, share in found.items()), sep="\n")
    print(*(f"{times:.2f} × the time of three products by one, {what}" for what, times in fused.items()), sep="\n")
    write_json(config.out, {"command": " ".join(sys.argv), "machine": machine(), "shares": found, "in one": fused})
    return 0


if __name__ == "__main__":
    sys.exit(command.run("text_keys", lambda arguments: main(tyro.cli(TextKeys, args=arguments))))
