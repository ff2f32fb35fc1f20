"""Where the subject is: a small network that finds its middle in a picture of the demo's world, and its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from tav_opt.demo import world
from tav_opt.demo.training import grid, to_unit

BATCH = 32


class Locator(nn.Module):
    """pixels (n, 3, H, W) in −1…1 → the subject's middle (n, 2), x and y in pixels: the mean of a map of likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2),
            nn.SiLU(),
            nn.Conv2d(16, 48, 5, 2, 2),
            nn.SiLU(),
            *(layer for dilation in (1, 2, 4) for layer in (nn.Conv2d(48, 48, 3, 1, dilation, dilation), nn.SiLU())),
            nn.Conv2d(48, 1, 3, 1, 1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        likely = self.layers(pixels).flatten(1).softmax(1)  # n (h w)
        side = pixels.shape[2] // 4
        middles = torch.arange(side, dtype=pixels.dtype, device=pixels.device) * 4 + 1.5
        y, x = torch.meshgrid(middles, middles, indexing="ij")
        return likely @ torch.stack([x.flatten(), y.flatten()], 1)


class LocatorStage:
    """Distance to the true middle of the subject, in pictures of every style."""

    name = "locator"
    lr = 1e-3

    def __init__(self, sprites: Mapping[str, Sequence[Image.Image]], *, test: int = 200) -> None:
        self.subjects, self.sprites = list(sprites), sprites
        self.locator = Locator()
        self.modules = nn.ModuleDict({"locator": self.locator})
        self.test, self.middles = self._pictures(np.random.default_rng(4), test, kept_out=True)

    def _pictures(self, rng: np.random.Generator, count: int, *, kept_out: bool) -> tuple[np.ndarray, Tensor]:
        scenes = [world.draw_scene(rng, self.subjects, kept_out=kept_out) for _ in range(count)]
        pictures, middles = zip(*(world.compose_at(scene, self.sprites, rng) for scene in scenes), strict=True)
        return np.stack(pictures), torch.tensor(middles, dtype=torch.float32)

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Mean distance in pixels."""
        images, middles = self._pictures(rng, BATCH, kept_out=False)
        return (self.locator(to_unit(images)) - middles).norm(dim=1).mean()

    @torch.no_grad()
    def error(self) -> float:
        """Mean distance from the true middle on held-out pictures, in pixels."""
        return float((self.locator(to_unit(self.test)) - self.middles).norm(dim=1).mean())

    def sheet(self) -> np.ndarray:
        """Held-out pictures with a cross where the subject's middle was found."""
        print(f"mean distance on held-out pictures: {self.error():.2f} pixels", flush=True)
        found = self.locator(to_unit(self.test[:12])).tolist()
        return grid(np.stack([_marked(picture, *at) for picture, at in zip(self.test[:12], found, strict=True)]), 12)


def _marked(image: np.ndarray, x: float, y: float) -> np.ndarray:
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for line in ((x - 4, y, x + 4, y), (x, y - 4, x, y + 4)):
        draw.line(line, fill=(255, 0, 0), width=2)
    return np.asarray(picture)
