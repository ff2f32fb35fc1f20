"""What inflation costs: the video UNet against diffusers' image UNet on the same frames, in turn, in one run.

`python benchmarks/inflation.py` (the case: 36 M values, 2 clips of 8 frames, 32×32 latents).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from common import Timing, header, save, table, timed
from diffusers import UNet2DConditionModel

from tav_opt import command
from tav_opt.unet import inflate

CONFIG = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 256, 256),
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "layers_per_block": 2,
}


@dataclass(frozen=True, kw_only=True)
class Inflation:
    """Time one forward pass of the image UNet on b·f images and of the video UNet on b clips of f frames."""

    clips: int = 2
    frames: int = 8
    rounds: int = 9
    """The two are called in turn, so that a drifting machine harms both alike."""
    out: Path = Path("benchmarks/results/inflation.json")


@torch.no_grad()
def main(config: Inflation) -> int:
    """Checks that one frame alone gives the image model's answer, times both and prints the ratio of the medians."""
    torch.manual_seed(0)
    image = UNet2DConditionModel(**CONFIG).eval()
    video = UNet2DConditionModel(**CONFIG).eval()
    video.load_state_dict(image.state_dict())
    video = inflate(video).eval()
    b, f = config.clips, config.frames
    latents, text = torch.randn(b, 4, f, 32, 32), torch.randn(b, 77, 128)
    timesteps = torch.full((b,), 500)
    images, texts = latents.transpose(1, 2).flatten(0, 1), text.repeat_interleave(f, 0)
    error = _check(image, video, latents, timesteps, text)
    rounds: dict[str, list[Timing]] = {"image UNet": [], "video UNet": []}
    for number in range(config.rounds):
        warmup = int(number == 0)
        rounds["image UNet"].append(
            timed("", lambda: image(images, timesteps.repeat_interleave(f), texts), calls=1, warmup=warmup)
        )
        rounds["video UNet"].append(timed("", lambda: video(latents, timesteps, text), calls=1, warmup=warmup))
    timings = [_summary(name, found) for name, found in rounds.items()]
    what = f"inflation: {b} clips of {f} frames, 32×32 latents, forward"
    print(header(what))
    print(table("CPU" if not torch.cuda.is_available() else "GPU", timings))
    ratio = timings[1].median / timings[0].median
    print(f"\nvideo / image = {ratio:.2f}; one frame differs from the image model by {error:.1e}")
    save(config.out, {"what": what, "command": " ".join(sys.argv)}, {"pytorch": timings}, {"one_frame_error": error})
    return 0


def _check(
    image: torch.nn.Module, video: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor
) -> float:
    """With one frame and without the bias that temporal attention starts with, both are the same network."""
    biases = [p for name, p in video.named_parameters() if name.endswith("attn_temp.to_out.0.bias")]
    kept = [p.clone() for p in biases]
    for p in biases:
        p.zero_()
    error = (video(latents[:, :, :1], timesteps, text)[:, :, 0] - image(latents[:, :, 0], timesteps, text).sample).abs()
    for p, value in zip(biases, kept, strict=True):
        p.copy_(value)
    assert error.max() < 1e-4, f"the video UNet of one frame is not the image UNet: {error.max():.1e}"
    return float(error.max())


def _summary(name: str, rounds: list[Timing]) -> Timing:
    seconds = torch.tensor([t.median for t in rounds], dtype=torch.float64)
    p10, median, p90 = seconds.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Timing(name, median, p10, p90, len(rounds))


if __name__ == "__main__":
    sys.exit(command.run("inflation", lambda arguments: main(tyro.cli(Inflation, args=arguments))))
