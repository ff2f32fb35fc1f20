"""What the text's keys and values cost in a step: `python benchmarks/text_keys.py --help`.

They are the same at every step of an edit. Counted: their share of a guided step's floating-point operations. Timed:
their share of a step of the demo's model on a processor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
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
    """Of the time of a step: medians of both, which take turns."""
    text = torch.randn(2, 77, unet.config.cross_attention_dim)
    kinds = (step(unet, frames, side, "cpu"), lambda: [module(text) for module in projections(unet)])
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(calls + 1):
        for run, times in zip(kinds, seconds, strict=True):
            start = time.perf_counter()
            run()
            if number:
                times.append(time.perf_counter() - start)
    return float(np.median(seconds[1]) / np.median(seconds[0]))


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
    print(header("keys and values of the text"))
    print(*(f"{share:.2%} {what}" for what, share in found.items()), sep="\n")
    write_json(config.out, {"command": " ".join(sys.argv), "machine": machine(), "shares": found})
    return 0


if __name__ == "__main__":
    sys.exit(command.run("text_keys", lambda arguments: main(tyro.cli(TextKeys, args=arguments))))
