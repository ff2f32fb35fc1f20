"""The demo's UNet and text encoder, and the stage that trains them on latents of the trained VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel

from tav_opt import ddim
from tav_opt.demo import world
from tav_opt.demo.sizes import SHIPPED, Size
from tav_opt.demo.text import TOKENS, WIDTH, new_tokenizer, text_config
from tav_opt.demo.training import CPU, FRESH, POOL, grid, mixed_precision, to_images, to_unit

MIN_SNR = 5.0
"""Hang et al. 2023 (arXiv 2303.09556): larger signal-to-noise ratios count as this one."""
SHEET_PROMPTS = (
    "a leopard on the beach",
    "a rabbit in the snow",
    "a racing car in the city",
    "a penguin on a white background",
    "an elephant in the desert",
    "a burger on a blue background",
    "a tiger in the forest",
    "a rocket under the night sky",
    "a tiger on a meadow, pencil sketch",
    "a fox in the snow, pixel art",
    "a sailboat at sunset",
    "a panda on a pink background, black and white",
)


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's process, predicting v."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def new_unet(size: Size = SHIPPED) -> UNet2DConditionModel:
    """An untrained UNet of SD's blocks; attention at 8×8 and 4×4 only, where it costs little."""
    return UNet2DConditionModel(
        sample_size=size.latents,
        in_channels=size.latent_channels,
        out_channels=size.latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=size.unet_widths,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )


class Text2ImageStage:
    """v-prediction on pooled latents, weighted by the clipped signal-to-noise ratio."""

    name = "text2image"
    lr = 1e-3

    def __init__(
        self,
        sprites: Mapping[str, Sequence[Image.Image]],
        vae: AutoencoderKL,
        size: Size = SHIPPED,
        *,
        pool: int = POOL,
        seed: int = 2,
        device: torch.device = CPU,
    ) -> None:
        self.subjects, self.sprites = list(sprites), sprites
        self.size, self.device = size, device
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.tokenizer = new_tokenizer(self.subjects)
        self.scheduler = new_scheduler()
        self.unet = new_unet(size).to(device)
        self.text_encoder = CLIPTextModel(text_config(self.tokenizer)).to(device)
        self.modules = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
        self.pool, self.seed = pool, seed
        self.latents, self.scenes = torch.empty(0), list[world.Scene]()

    def _fill(self) -> None:
        parts = [self._encoded(np.random.default_rng((self.seed, part)), 50) for part in range(self.pool // 50)]
        self.latents = torch.cat([latents for latents, _ in parts])
        self.scenes = [scene for _, scenes in parts for scene in scenes]

    def _encoded(self, rng: np.random.Generator, count: int) -> tuple[Tensor, list[world.Scene]]:
        scenes = [world.draw_scene(rng, self.subjects) for _ in range(count)]
        pictures = np.stack([world.compose(scene, self.sprites, rng, self.size.side) for scene in scenes])
        with torch.no_grad(), mixed_precision(self.device):
            latents = self.vae.encode(to_unit(pictures).to(self.device)).latent_dist.mean
        return latents.float() * self.vae.config.scaling_factor, scenes

    def loss(self, rng: np.random.Generator) -> Tensor:
        """The weighted squared error of v."""
        if not self.scenes:
            self._fill()
        self._refresh(rng)
        batch = self.size.batch
        chosen = rng.integers(len(self.scenes), size=batch)
        ids = self._ids([world.caption(self.scenes[i], rng) for i in chosen])
        clean = self.latents[chosen]
        # One timestep from each of as many equal ranges: the loss varies less than with independent ones.
        timesteps = torch.from_numpy((np.arange(batch) + rng.random(batch)) * 1000 / batch).long()
        noise = torch.randn_like(clean)
        alpha = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1).to(self.device)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        # At these sizes plain attention is faster on a CPU than the flash kernel.
        plain = sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()
        with mixed_precision(self.device), plain:
            found = self._predict(noisy, timesteps.to(self.device), self.text_encoder(ids)[0])
        ratio = alpha / (1 - alpha)
        weight = ratio.clamp(max=MIN_SNR) / (ratio + 1)
        return (weight * (found.float() - target).square()).mean()

    def _refresh(self, rng: np.random.Generator) -> None:
        latents, scenes = self._encoded(rng, FRESH)
        for place, latent, scene in zip(rng.integers(len(self.scenes), size=FRESH), latents, scenes, strict=True):
            self.latents[place], self.scenes[place] = latent, scene

    def _predict(self, latents: Tensor, timesteps: Tensor | int, text: Tensor) -> Tensor:
        return self.unet(latents, timesteps, text).sample

    def _predict_clip(self, latents: Tensor, timestep: ddim.Timestep, text: Tensor) -> Tensor:
        return self._predict(latents[:, :, 0], timestep, text)[:, :, None]  # b c 1 h w

    def _ids(self, captions: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(captions), **options).input_ids.to(self.device)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], *, steps: int = 25, guidance_scale: float = 4.0, seed: int = 0
    ) -> np.ndarray:
        """Pictures uint8 (prompts, H, W, 3) by guided DDIM from seeded noise."""
        shape = (len(prompts), self.size.latent_channels, 1, self.size.latents, self.size.latents)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        text, empty = (self.text_encoder(self._ids(p))[0] for p in (prompts, [""] * len(prompts)))
        latents = ddim.sample(
            self._predict_clip,
            noise,
            text,
            ddim.Schedule.from_config(self.scheduler.config),
            steps,
            unconditional=empty,
            guidance_scale=guidance_scale,
        )
        return to_images(self.vae.decode(latents[:, :, 0] / self.vae.config.scaling_factor).sample)

    def sheet(self) -> np.ndarray:
        """A picture of each prompt of the sheet."""
        return grid(self.generate(SHEET_PROMPTS), 6)
