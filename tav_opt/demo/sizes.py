"""The sizes at which the demo's text-to-image model is trained: what ships, and what a GPU can train."""

from __future__ import annotations

from dataclasses import dataclass

from tav_opt.demo import world


@dataclass(frozen=True, kw_only=True)
class Size:
    """A size of pictures, and the networks and batches for it."""

    side: int
    """Of the pictures, in pixels."""
    vae_widths: tuple[int, ...]
    """Of the VAE's levels; each after the first halves the picture."""
    latent_channels: int
    unet_widths: tuple[int, ...]
    vae_batch: int
    batch: int
    """Of text2image."""
    kept: bool = False
    """The VAE learns from pictures kept ready, as text2image does: a GPU would wait for those composed anew."""

    @property
    def factor(self) -> int:
        """Pixels of a side to one latent."""
        return 1 << (len(self.vae_widths) - 1)

    @property
    def latents(self) -> int:
        """Latents of a side."""
        return self.side // self.factor


SHIPPED = Size(
    side=world.SIZE,
    vae_widths=(16, 32, 64),
    latent_channels=6,
    unet_widths=(64, 128, 192),
    vae_batch=16,
    batch=32,
)
LARGE = Size(
    side=2 * world.SIZE,
    vae_widths=(32, 64, 96, 128),
    latent_channels=16,
    unet_widths=(96, 160, 224),
    vae_batch=48,
    batch=96,
    kept=True,
)
"""For one GPU in 25 minutes; in fp16 all parts come to 39.6 MB."""
SIZES = {size.side: size for size in (SHIPPED, LARGE)}
