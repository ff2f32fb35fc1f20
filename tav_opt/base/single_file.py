"""Single-file checkpoints of Stable Diffusion 1.x and 2.x, read by diffusers' own single-file loader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tav_opt.base import configuration, weights
from tav_opt.config import InputError, first_line

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

_UNET, _VAE = "model.diffusion_model.", ("first_stage_model.", "vae.")
_TEXT = {
    "1.x": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "2.x": "cond_stage_model.model.token_embedding.weight",
}
"""By which diffusers tells CLIP's text encoder from OpenCLIP's."""
_OTHERS = {
    "conditioner.": "of Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "of Stable Diffusion 3",
    "double_blocks.": "of Flux",
    "control_model.": "a ControlNet",
    "lora": "a LoRA: give a model, and it with --lora",
}
V1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Whose configurations and tokenizer every Stable Diffusion 1.x shares."""


def config_folder(file: Path, model_config: str | None) -> Path:
    """Where the configurations and tokenizer of a single file are; raises InputError, saying what to give.

    For Stable Diffusion 1.x they may come from the hub, or its cache. Those of 2.x differ in what the network predicts,
    which no file tells.
    """
    from tav_opt.base import hub

    if model_config is not None:
        folder = Path(model_config).expanduser()
        if folder.is_dir():
            return folder
        if len(folder.parts) != 2 or folder.is_absolute() or model_config.startswith("."):
            raise InputError(f"model config {model_config!r} is neither a directory nor a hub id (owner/name)")
        return hub.fetch_configurations(model_config)
    if _kind(weights.load_single(file), file) == "2.x":
        raise InputError(
            f"model {file} is of Stable Diffusion 2.x, whose kinds predict noise or v, and no file tells which: give "
            f"--model-config, a directory or hub id of its kind"
        )
    try:
        return hub.fetch_configurations(V1)
    except InputError as error:
        raise InputError(
            f"model {file} has no configurations and tokenizer in it: give --model-config, a Stable Diffusion "
            f"directory of its kind ({error})"
        ) from None


def _kind(tensors: Mapping[str, Tensor], file: Path) -> str:
    """Whether it is of Stable Diffusion 1.x or 2.x; raises InputError, saying what it is, where neither."""
    for mark, kind in _OTHERS.items():
        if any(name.startswith(mark) for name in tensors):
            raise InputError(f"model {file} is {kind}; Stable Diffusion 1.x and 2.x are what can be tuned")
    if not any(name.startswith(_UNET) for name in tensors):
        found = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise InputError(f"model {file} is no Stable Diffusion checkpoint: no {_UNET}… is in it, but {found}")
    for kind, name in _TEXT.items():
        if name in tensors:
            return kind
    raise InputError(f"model {file} holds no text encoder (cond_stage_model.…): a whole checkpoint is needed")


def load(
    file: Path, folder: Path, *, with_vae: bool
) -> tuple[UNet2DConditionModel, AutoencoderKL | None, CLIPTextModel]:
    """UNet, VAE (None unless asked for) and text encoder of a file, after the configurations in a folder.

    Raises InputError for a file that is of another kind, corrupt, or lacks something.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextModel

    tensors = weights.load_single(file)
    _kind(tensors, file)
    if with_vae and not any(name.startswith(_VAE) for name in tensors):
        raise InputError(f"model {file} holds no VAE: give one with --vae")
    options: dict[str, Any] = {"config": str(folder), "local_files_only": True}
    misfit = f"model {file} does not fit the configurations in {folder}"
    try:
        unet = UNet2DConditionModel.from_single_file(dict(tensors), subfolder="unet", **options)
        vae = AutoencoderKL.from_single_file(dict(tensors), subfolder="vae", **options) if with_vae else None
        text = create_diffusers_clip_model_from_ldm(CLIPTextModel, dict(tensors), subfolder="text_encoder", **options)
    except NotImplementedError:  # of values that no tensor of the file took the place of
        raise InputError(f"{misfit}: tensors of its UNet or VAE are missing") from None
    except Exception as error:  # of as many kinds as there are ways not to fit
        why = first_line(error).split(" If you want")[0]  # to try options of diffusers
        raise InputError(f"{misfit}: {why}") from None
    for part, model in zip(configuration.WEIGHED, (unet, vae, text), strict=True):
        if left := [] if model is None else [name for name, value in model.named_parameters() if value.is_meta]:
            raise InputError(f"{misfit}: {part} lacks {left[0]}, …")
    there = sum(value.numel() for name, value in tensors.items() if name.startswith(_UNET))
    if there != (used := sum(value.numel() for value in unet.parameters())):
        raise InputError(f"{misfit}: its UNet has {there} values, theirs {used}")
    return unet, vae, text
