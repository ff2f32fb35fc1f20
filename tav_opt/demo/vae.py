"""The demo's VAE: SD's AutoencoderKL at a quarter of the size, and the stage that trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from tav_opt.demo import world
from tav_opt.demo.training import grid, mixed_precision, to_images, to_unit

BATCH = 16
KL_WEIGHT = 1e-5
GRADIENT_WEIGHT = 0.5


def new_vae() -> AutoencoderKL:
    """An untrained VAE: 64×64 pixels ↔ 16×16 latents of 6 channels."""
    levels = 3
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=6,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


class VaeStage:
    """Reconstruction in pixels and their gradients, with a light pull towards a unit normal."""

    name = "vae"
    lr = 2e-3

    def __init__(self, sprites: Mapping[str, Sequence[Image.Image]]) -> None:
        self.sprites = sprites
        self.vae = new_vae()
        self.modules = nn.ModuleDict({"vae": self.vae})
        self.test = self._pictures(np.random.default_rng(1), 48, kept_out=True)

    def _pictures(self, rng: np.random.Generator, count: int, *, kept_out: bool) -> np.ndarray:
        subjects = list(self.sprites)
        scenes = [world.draw_scene(rng, subjects, kept_out=kept_out) for _ in range(count)]
        return np.stack([world.compose(scene, self.sprites, rng) for scene in scenes])

    def loss(self, rng: np.random.Generator) -> Tensor:
        """L1 of pixels and of their gradients, plus KL."""
        images = to_unit(self._pictures(rng, BATCH, kept_out=False))
        with mixed_precision():
            posterior = self.vae.encode(images).latent_dist
            found = self.vae.decode(posterior.sample()).sample
        error = found.float() - images
        across, down = error.diff(dim=3), error.diff(dim=2)
        reconstruction = functional.l1_loss(error, torch.zeros_like(error)) + 2 * error.square().mean()
        gradients = across.abs().mean() + down.abs().mean()
        return reconstruction + GRADIENT_WEIGHT * gradients / 2 + KL_WEIGHT * posterior.kl().float().mean()

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Pictures (n, H, W, 3) through encoder and decoder."""
        latents = self.vae.encode(to_unit(images)).latent_dist.mean
        return to_images(self.vae.decode(latents).sample)

    def sheet(self) -> np.ndarray:
        """Held-out pictures above their reconstructions."""
        found = self.reconstruct(self.test[:12])
        print(f"PSNR on held-out pictures: {psnr(self.test, self.reconstruct(self.test)):.2f} dB", flush=True)
        return grid(np.concatenate([self.test[:12], found]), 12)


def psnr(truth: np.ndarray, found: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio in dB of uint8 pictures (n, H, W, 3)."""
    errors = np.square(truth.astype(np.float64) - found).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-9))))
