"""The demo's VAE: SD's AutoencoderKL with fewer or narrower levels, and the stage that trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from tav_opt.demo import world
from tav_opt.demo.sizes import SHIPPED, Size
from tav_opt.demo.training import CPU, FRESH, POOL, grid, mixed_precision, to_images, to_unit

KL_WEIGHT = 1e-5
GRADIENT_WEIGHT = 0.5


def new_vae(size: Size = SHIPPED) -> AutoencoderKL:
    """An untrained VAE: 64×64 pixels ↔ 16×16 latents of 6 channels, or 128×128 ↔ 16×16 of 16."""
    levels = len(size.vae_widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=size.vae_widths,
        layers_per_block=1,
        latent_channels=size.latent_channels,
        norm_num_groups=8,
        sample_size=size.side,
        mid_block_add_attention=False,
    )


class VaeStage:
    """Reconstruction in pixels and their gradients, with a light pull towards a unit normal."""

    name = "vae"
    lr = 2e-3

    def __init__(
        self,
        sprites: Mapping[str, Sequence[Image.Image]],
        size: Size = SHIPPED,
        *,
        pool: int = POOL,
        device: torch.device = CPU,
    ) -> None:
        self.sprites, self.size, self.pool, self.device = sprites, size, pool, device
        self.vae = new_vae(size).to(device)
        self.modules = nn.ModuleDict({"vae": self.vae})
        self.test = self._pictures(np.random.default_rng(1), 48, kept_out=True)
        self.kept: np.ndarray | None = None

    def _pictures(self, rng: np.random.Generator, count: int, *, kept_out: bool) -> np.ndarray:
        subjects = list(self.sprites)
        scenes = [world.draw_scene(rng, subjects, kept_out=kept_out) for _ in range(count)]
        return np.stack([world.compose(scene, self.sprites, rng, self.size.side) for scene in scenes])

    def _batch(self, rng: np.random.Generator) -> np.ndarray:
        """Pictures composed for this step, or some of those kept, a few of which are composed anew."""
        if not self.size.kept:
            return self._pictures(rng, self.size.vae_batch, kept_out=False)
        if self.kept is None:
            self.kept = self._pictures(np.random.default_rng(5), self.pool, kept_out=False)
        self.kept[rng.integers(self.pool, size=FRESH)] = self._pictures(rng, FRESH, kept_out=False)
        return self.kept[rng.integers(self.pool, size=self.size.vae_batch)]

    def loss(self, rng: np.random.Generator) -> Tensor:
        """L1 of pixels and of their gradients, plus KL."""
        images = to_unit(self._batch(rng)).to(self.device)
        with mixed_precision(self.device):
            posterior = self.vae.encode(images).latent_dist
            found = self.vae.decode(posterior.sample()).sample
        error = found.float() - images
        across, down = error.diff(dim=3), error.diff(dim=2)
        reconstruction = functional.l1_loss(error, torch.zeros_like(error)) + 2 * error.square().mean()
        gradients = across.abs().mean() + down.abs().mean()
        return reconstruction + GRADIENT_WEIGHT * gradients / 2 + KL_WEIGHT * posterior.kl().float().mean()

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Pictures (n, H, W, 3) through encoder and decoder."""
        latents = self.vae.encode(to_unit(images).to(self.device)).latent_dist.mean
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
