"""A tuned clip as a pipeline of diffusers:

pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline="examples/diffusers", trust_remote_code=True)
pipe.load_clip("ckpt/")
frames = pipe("a panda is skiing").frames[0]
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import BaseOutput
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from tav_opt import EditConfig, checkpoint, editing, models
from tav_opt.base.directory import checked_base
from tav_opt.ddim import Schedule
from tav_opt.engines.pytorch import TorchEngine
from tav_opt.unet import inflate


@dataclass
class TuneAVideoOutput(BaseOutput):
    """`frames`: of each prompt, PIL images, or float32 (prompts, f, H, W, 3) in 0…1; `fps`."""

    frames: Any
    fps: float


class TuneAVideoPipeline(DiffusionPipeline):
    """A Stable Diffusion's parts, inflated for a clip that tav-opt tuned on them."""

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=inflate(unet), scheduler=scheduler
        )
        self._tuned: checkpoint.Checkpoint | None = None

    def load_clip(self, clip: str | os.PathLike[str]) -> None:
        """Puts a clip's own values into the UNet: of a folder that `tav-opt tune` wrote, or of a hub id.

        Raises InputError for what is no clip, and for one that was tuned on another base.
        """
        tuned = checkpoint.load(clip)
        checked_base(self.config["_name_or_path"], tuned.info.base_hash)
        models.put_values(self.unet, tuned.values)
        self._tuned = tuned

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = EditConfig.steps,
        guidance_scale: float = EditConfig.guidance_scale,
        negative_prompt: str = "",
        eta: float = EditConfig.eta,
        seed: int = EditConfig.seed,
        video: np.ndarray | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[str, int, int], object] | None = None,
    ) -> TuneAVideoOutput:
        """Edits the clip, or `video` uint8 (f, H, W, 3) in its place, by each prompt."""
        if self._tuned is None:
            raise ValueError("no clip is loaded: pipe.load_clip(…) comes first")
        config = EditConfig(
            prompts=prompt,
            negative_prompt=negative_prompt,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            eta=eta,
            seed=seed,
        )
        told = (lambda *step: callback_on_step_end(*step[:3])) if callback_on_step_end else None
        edits = np.stack(list(editing.edit(self._engine(), config, frames=video, on_progress=told)))
        if output_type == "pil":
            frames: Any = [[Image.fromarray(picture) for picture in edit] for edit in edits]
        else:
            frames = edits.astype(np.float32) / 255
        return TuneAVideoOutput(frames=frames, fps=self._tuned.info.fps)

    def _engine(self) -> TorchEngine:
        """The parts as they are now, wherever `pipe.to(…)` has brought them."""
        assert self._tuned is not None
        base = models.Base.at(self.config["_name_or_path"])
        sd = models.StableDiffusion(
            base=base,
            unet=self.unet.eval(),
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            schedule=Schedule.from_config(base.configs["scheduler"]),
        )
        latents = [
            x.to(self.device, self.unet.dtype) for x in (self._tuned.source_latents, self._tuned.inverted_latents)
        ]
        return TorchEngine(sd=sd, info=self._tuned.info, source_latents=latents[0], inverted_latents=latents[1])
