"""An adapter that places the demo's subjects: where its map is bright, the subject is drawn.

It is diffusers' T2IAdapter of the kind made for SDXL, whose UNet begins with a block without attention as the demo's
does, and learns on the image model, which stays as it is (Mou et al. 2023, arXiv 2302.08453).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionAdapterPipeline, StableDiffusionPipeline, T2IAdapter, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tav_opt import ddim
from tav_opt.demo import world
from tav_opt.demo.text import TOKENS
from tav_opt.demo.training import grid, mixed_precision, to_unit
from tav_opt.demo.ways import SIZE, ellipse, ellipse_at

BATCH = 8
POOL = 500
"""Encoded pictures kept ready."""
FRESH = 1
"""Pictures of the pool replaced at each step."""
INVERTED, INVERSION_STEPS = 10, 8
"""Of so many pictures one is inverted by DDIM, in so many steps."""
INVERTED_SHARE = 0.5
"""Part of a batch whose noise is another picture's inverted latents: an edit begins with those of its source, which
hold where the subject was, and the map shall have the last word."""
ELLIPSES = 0.5
"""Part of the maps that are the ellipse in the silhouette's box, so that a roughly drawn place will do."""
BEGIN_PART, BEGIN_TIMESTEPS = 4, (200.0, 800.0)
"""Of what the adapter begins with: a step for so many pictures of the pool, and how noisy they are."""
SHEET = ("a tiger on the beach", "an elephant in the snow")


class ControlStage:
    """v-prediction by the frozen image model, which is told where the subject is."""

    name = "control"
    lr = 1e-3

    def __init__(
        self, sprites: Mapping[str, Sequence[Image.Image]], model: Path, *, pool: int = POOL, seed: int = 6
    ) -> None:
        self.subjects, self.sprites = list(sprites), sprites
        self.base = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
        for part in (self.base.vae, self.base.unet, self.base.text_encoder):
            part.requires_grad_(False)
        self.adapter = new_adapter(self.base.unet, self.base.vae_scale_factor)
        self.modules = nn.ModuleDict({"control": self.adapter})
        self.pool, self.seed = pool, seed
        self.latents, self.maps, self.scenes = torch.empty(0), torch.empty(0), list[world.Scene]()
        self.inverted = torch.empty(0)

    def _fill(self) -> None:
        parts = [self._encoded(np.random.default_rng((self.seed, part)), 50) for part in range(self.pool // 50)]
        latents, maps, scenes = zip(*parts, strict=True)
        self.latents, self.maps = torch.cat(latents), torch.cat(maps)
        self.scenes = [scene for part in scenes for scene in part]
        self.inverted = torch.cat([self._inverted(first) for first in range(0, self.pool // INVERTED, 50)])

    def begin(self) -> None:
        """Lets the adapter add what the encoder's blocks make of pictures with such a map, beyond what of any.

        It takes no step through the decoder, and spares as many of those as the adapter would need to get so far.
        """
        self._fill()
        found = self._activations()
        optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=self.lr)
        rng = np.random.default_rng(self.seed)
        for _ in range(self.pool // BEGIN_PART):
            chosen = rng.integers(len(self.scenes), size=2 * BATCH)
            features = self.adapter(self.maps[chosen][:, None].float() / 255)
            errors = ((x - y[chosen]).square().mean() / y.var() for x, y in zip(features, found, strict=True))
            optimizer.zero_grad(set_to_none=True)
            sum(errors, torch.zeros(())).backward()
            optimizer.step()

    @torch.no_grad()
    def _activations(self) -> list[Tensor]:
        """What each block of the encoder makes of the pool, where the adapter adds to it: less its mean."""
        made: list[list[Tensor]] = [[] for _ in self.base.unet.down_blocks]

        def keep(block: nn.Module, _: object, output: tuple[Tensor, tuple[Tensor, ...]]) -> None:
            number = list(self.base.unet.down_blocks).index(block)
            made[number].append(output[1][0 if getattr(block, "has_cross_attention", False) else -1])

        hooks = [block.register_forward_hook(keep) for block in self.base.unet.down_blocks]
        for first in range(0, len(self.scenes), 50):
            clean, scenes = self.latents[first : first + 50], self.scenes[first : first + 50]
            timesteps = torch.linspace(*BEGIN_TIMESTEPS, len(clean)).round().long()
            alpha = self.base.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * torch.randn_like(clean)
            self.base.unet(noisy, timesteps, self._text([world.prompt(scene) for scene in scenes]))
        for hook in hooks:
            hook.remove()
        whole = [torch.cat(parts) for parts in made]
        return [x - x.mean(0) for x in whole]

    def _inverted(self, first: int) -> Tensor:
        chosen = slice(first, min(first + 50, self.pool // INVERTED))
        latents, scenes = self.latents[chosen], self.scenes[chosen]

        def predict(x: Tensor, timestep: ddim.Timestep, text: Tensor) -> Tensor:
            return self.base.unet(x[:, :, 0], timestep, text).sample[:, :, None]  # b c 1 h w

        schedule = ddim.Schedule.from_config(self.base.scheduler.config)
        text = self._text([world.prompt(scene) for scene in scenes])
        return ddim.invert(predict, latents[:, :, None], text, schedule, INVERSION_STEPS)[:, :, 0]

    def _encoded(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, list[world.Scene]]:
        scenes = [world.draw_scene(rng, self.subjects) for _ in range(count)]
        drawn = [world.compose_whole(scene, self.sprites, rng) for scene in scenes]
        maps = [ellipse(one.silhouette) if rng.random() < ELLIPSES else one.silhouette for one in drawn]
        vae = self.base.vae
        with torch.no_grad(), mixed_precision():
            latents = vae.encode(to_unit(np.stack([one.picture for one in drawn]))).latent_dist.mean
        return latents.float() * vae.config.scaling_factor, torch.from_numpy(np.stack(maps)), scenes

    def loss(self, rng: np.random.Generator) -> Tensor:
        """The squared error of v; most timesteps are early ones of an edit, where places are settled."""
        if not self.scenes:
            self._fill()
        self._refresh(rng)
        chosen = rng.integers(len(self.scenes), size=BATCH)
        text = self._text([world.caption(self.scenes[i], rng) for i in chosen])
        clean = self.latents[chosen]
        # The paper's cubic sampling (its section 3.4), one from each of BATCH equal ranges.
        part = torch.from_numpy((np.arange(BATCH) + rng.random(BATCH)) / BATCH)
        timesteps = (999 * (1 - part**3)).round().long()
        alpha = self.base.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = self._noise(rng)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        features = self.adapter(self.maps[chosen][:, None].float() / 255)
        with mixed_precision(), sdpa_kernel(SDPBackend.MATH):
            found = self.base.unet(noisy, timesteps, text, down_intrablock_additional_residuals=features).sample
        return (found.float() - target).square().mean()

    def _noise(self, rng: np.random.Generator) -> Tensor:
        noise = torch.randn(BATCH, *self.latents.shape[1:])
        known = torch.from_numpy(rng.random(BATCH) < INVERTED_SHARE)
        noise[known] = self.inverted[rng.integers(len(self.inverted), size=int(known.sum()))]
        return noise

    def _refresh(self, rng: np.random.Generator) -> None:
        latents, maps, scenes = self._encoded(rng, FRESH)
        for number, place in enumerate(rng.integers(len(self.scenes), size=FRESH)):
            self.latents[place], self.maps[place] = latents[number], maps[number]
            self.scenes[place] = scenes[number]

    @torch.no_grad()
    def _text(self, captions: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        return self.base.text_encoder(self.base.tokenizer(list(captions), **options).input_ids)[0]

    def sheet(self) -> np.ndarray:
        """Ellipses from left to right, and of each prompt the pictures that follow them, by diffusers' pipeline."""
        maps = np.stack([ellipse_at((x, 0.6), SIZE, world.SIZE) for x in (0.3, 0.5, 0.7)])
        parts = {name: part for name, part in self.base.components.items() if name != "image_encoder"}
        pipeline = StableDiffusionAdapterPipeline(**parts, adapter=self.adapter, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            [prompt for prompt in SHEET for _ in maps],
            image=[Image.fromarray(one) for one in (*maps,) * len(SHEET)],
            num_inference_steps=15,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        shown = (np.asarray(drawn) * 255).round().astype(np.uint8)
        return grid(np.concatenate([maps[..., None].repeat(3, -1), shown]), len(maps))


def new_adapter(unet: UNet2DConditionModel, vae_factor: int) -> T2IAdapter:
    """An untrained adapter of grey maps for the demo's UNet."""
    return T2IAdapter(
        in_channels=1,
        channels=list(unet.config.block_out_channels),
        num_res_blocks=2,
        downscale_factor=2 * vae_factor,  # its first two features have the size behind the first block
        adapter_type="full_adapter_xl",
    )
