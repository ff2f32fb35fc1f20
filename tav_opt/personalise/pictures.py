"""Pictures of an image model: those that it learns from, encoded, and those that it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tav_opt import ddim, models, video
from tav_opt.base.directory import Base
from tav_opt.base.image_model import ImageModel
from tav_opt.config import InputError, PersonaliseConfig
from tav_opt.ddim import Schedule, Timestep, timestep_rows
from tav_opt.files import read_object, whole, write_json
from tav_opt.video.containers import LOCAL, still
from tav_opt.video.pixels import to_frames, to_host, to_unit

MOST = 64
"""Pictures of a subject; three to five are what the paper takes."""
AT_ONCE = 8
DRAWN = "drawn.json"
"""Beside the pictures of a class: how they were drawn."""


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
    numbers: Sequence[int] = (),
    on_step: ddim.OnStep = lambda _: None,
) -> np.ndarray:
    """Pictures uint8 (prompts, H, W, 3) by guided DDIM, each from noise of its own by the seed and its number.

    `side`: of the latents; `numbers`: of the pictures, from 0 unless given.
    """
    unet = image.unet
    assert unet is not None
    shape = (unet.config.in_channels, 1, side, side)
    seeds = [config.seed + 1000 * number for number in numbers or range(len(prompts))]
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
    base: Base,
    schedule: Schedule,
    prompts: Sequence[str],
    config: PersonaliseConfig,
    folder: Path,
    on_picture: Callable[[int, int], object],
) -> np.ndarray:
    """What the model draws of the class before it learns: uint8 (n, H, W, 3), each prompt in its turn.

    They are kept as `folder`/*.png; those of a run before are taken as they are. Raises InputError for a folder whose
    pictures were drawn otherwise.
    """
    size = base.native_size
    files = [folder / f"{number:05}.png" for number in range(config.class_images)]
    _claim(
        folder,
        {
            "base": base.hash,
            "class_prompt": one_or_all(prompts),
            "seed": config.seed,
            "draw_steps": config.draw_steps,
            "draw_guidance": config.draw_guidance,
            "size": size,
        },
    )
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    for start in range(0, len(missing), AT_ONCE):
        numbers = missing[start : start + AT_ONCE]
        given = [prompts[number % len(prompts)] for number in numbers]
        drawn = draw(image, schedule, given, size // base.vae_factor, config, numbers=numbers)
        for number, picture in zip(numbers, drawn, strict=True):
            with whole(files[number]) as temporary:
                Image.fromarray(picture).save(temporary)
        on_picture(len(files) - len(missing) + start + len(numbers), len(files))
    return np.stack([_read_drawn(file, size) for file in files])


def one_or_all(prompts: Sequence[str]) -> str | list[str] | None:
    """Prompts of a class as they are noted."""
    return list(prompts) if len(prompts) > 1 else prompts[0] if prompts else None


def _read_drawn(file: Path, size: int) -> np.ndarray:
    """uint8 (size, size, 3); raises InputError for a file that is no such picture."""
    picture = np.asarray(still(file, LOCAL))
    if picture.shape != (size, size, 3):
        raise InputError(f"{file} is {picture.shape[1]}×{picture.shape[0]}, not {size}×{size} as it was drawn")
    return picture


def _claim(folder: Path, how: dict[str, Any]) -> None:
    """Notes how the pictures of a folder are drawn; raises InputError, naming what differs, where others lie there."""
    note = folder / DRAWN
    if not note.is_file():
        if any(folder.glob("*.png")):
            raise InputError(f"{folder} holds pictures of which no {DRAWN} tells how they were drawn: move them")
        write_json(note, how)
    before = read_object(note)
    for name, value in how.items():
        if before.get(name) != value:
            raise InputError(
                f"{folder} holds pictures drawn with {name} {before.get(name)!r}, not {value!r}: move the folder, or "
                "choose another --out"
            )
