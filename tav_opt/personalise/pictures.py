"""Pictures of an image model: those that it learns from, encoded, and those that it draws."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tav_opt import ddim, models, video
from tav_opt.base.image_model import ImageModel
from tav_opt.config import InputError, PersonaliseConfig
from tav_opt.ddim import Schedule, Timestep, timestep_rows
from tav_opt.files import whole
from tav_opt.video.pixels import to_frames, to_host, to_unit

MOST = 64
"""Pictures of a subject; three to five are what the paper takes."""
AT_ONCE = 8


def read(folder: Path, size: int) -> np.ndarray:
    """The pictures of a folder, fitted to a square: uint8 (n, size, size, 3); raises InputError for other contents."""
    if not folder.is_dir():
        raise InputError(f"images {folder} is no folder: three to five pictures of the subject belong into one")
    pictures = video.read(folder, height=size, width=size).frames
    if len(pictures) > MOST:
        raise InputError(f"images {folder} holds {len(pictures)} pictures: three to five are enough, {MOST} the most")
    return pictures


@torch.no_grad()
def encode(image: ImageModel, pictures: np.ndarray) -> Tensor:
    """uint8 (n, H, W, 3) → scaled latents (n, c, h, w), the mean of the VAE's posterior."""
    pixels = to_unit(pictures).to(image.vae.device, image.vae.dtype)
    parts = [image.vae.encode(part).latent_dist.mean for part in pixels.split(AT_ONCE)]
    return (torch.cat(parts) * image.vae.config.scaling_factor).float()


def embed(image: ImageModel, prompts: Sequence[str]) -> Tensor:
    """Prompts → text (prompts, tokens, width)."""
    ids = models.tokenize(image.tokenizer, prompts).to(image.text_encoder.device)
    return image.text_encoder(ids)[0]


@torch.no_grad()
def draw(
    image: ImageModel,
    schedule: Schedule,
    prompts: Sequence[str],
    side: int,
    config: PersonaliseConfig,
    *,
    first: int = 0,
    on_step: ddim.OnStep = lambda _: None,
) -> np.ndarray:
    """Pictures uint8 (prompts, H, W, 3) by guided DDIM, each from noise of its own by the seed and its number.

    `side`: of the latents; `first`: the number of the first picture.
    """
    unet = image.unet
    assert unet is not None
    shape = (unet.config.in_channels, 1, side, side)
    seeds = [config.seed + 1000 * (first + number) for number in range(len(prompts))]
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    text, empty = (embed(image, given).float() for given in (prompts, [""] * len(prompts)))

    def predict(latents: Tensor, timestep: Timestep, given: Tensor) -> Tensor:  # b c 1 h w
        inputs = latents[:, :, 0].to(unet.dtype), timestep_rows(timestep, latents), given.to(unet.dtype)
        return unet(*inputs).sample[:, :, None].float()

    latents = ddim.sample(
        predict,
        noise.to(unet.device),
        text,
        schedule,
        config.draw_steps,
        unconditional=empty,
        guidance_scale=config.draw_guidance,
        on_step=on_step,
    )
    images = (latents[:, :, 0] / image.vae.config.scaling_factor).to(image.vae.dtype)
    return to_host(torch.cat([to_frames(image.vae.decode(part).sample) for part in images.split(AT_ONCE)]))


def of_class(
    image: ImageModel,
    schedule: Schedule,
    prompt: str,
    side: int,
    config: PersonaliseConfig,
    folder: Path,
    on_picture: Callable[[int, int], object],
) -> np.ndarray:
    """What the model draws of the class before it learns: uint8 (n, H, W, 3), kept as `folder`/*.png.

    Those of a run before are taken as they are.
    """
    wanted = config.class_images
    if (done := len(list(folder.glob("*.png")))) > wanted:
        shutil.rmtree(folder)
        done = 0
    while done < wanted:
        count = min(AT_ONCE, wanted - done)
        drawn = draw(image, schedule, [prompt] * count, side, config, first=done)
        for number, picture in enumerate(drawn, start=done):
            with whole(folder / f"{number:05}.png") as temporary:
                Image.fromarray(picture).save(temporary)
        done += count
        on_picture(done, wanted)
    return video.read(folder).frames
