"""The image model that is inflated: its parts as diffusers and transformers have them, what is added to it fused in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from tav_opt.base import configuration, loras, single_file, textual_inversion, weights
from tav_opt.base.directory import Base
from tav_opt.config import InputError, first_line
from tav_opt.files import refuse_pointer

diffusers_logging.set_verbosity_error()  # configurations of 2022 hold entries that it warns of
transformers_logging.set_verbosity_error()  # what of its tables matters is said below, in one line
transformers_logging.disable_progress_bar()  # of loading a text encoder: half a second

Model = TypeVar("Model", UNet2DConditionModel, AutoencoderKL)

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of the VAE's attention, until diffusers 0.17."""


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """The parts of a base in float32; no UNet where the reference saved the base, whose UNet is inflated already."""

    unet: UNet2DConditionModel | None
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    @classmethod
    def load(cls, base: Base) -> ImageModel:
        """Raises InputError for parts and additions that are missing, corrupt or do not fit."""
        words = load_tokenizer(base)
        if base.single:
            unet, own, text_encoder = single_file.load(base.path, base.folder, with_vae=not base.files["vae"])
            vae = own or _vae(base)
        else:
            vae, text_encoder = _vae(base), _text_encoder(base)
            video = configuration.is_reference_unet(base.configs["unet"])
            unet = None if video else load_unet(base.configs["unet"], base.files["unet"])
        model = cls(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=words)
        if base.loras or base.embeddings:
            if unet is None:
                raise InputError(f"model {base.path} was tuned on a clip by the reference: nothing can be added to it")
            pipeline = model.pipeline(base)
            loras.fuse(pipeline, base.loras)
            textual_inversion.add(pipeline, base.embeddings)
        return model

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The weights of the networks that people train, the UNet and the text encoder, by part and name."""
        return {
            f"{name}.{inner}": parameter
            for name, part in (("unet", self.unet), ("text_encoder", self.text_encoder))
            if part is not None
            for inner, parameter in part.named_parameters()
        }

    def pipeline(self, base: Base) -> StableDiffusionPipeline:
        """The parts as diffusers' pipeline, which shares them."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(base.configs["scheduler"]),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def load_unet(config: dict[str, Any], files: list[Path]) -> UNet2DConditionModel:
    """An image UNet of a folder; raises InputError where configuration and weights do not fit."""
    image = empty(UNet2DConditionModel, config, files[0].parent)
    load_strictly(image, weights.read(files), files[0].parent)
    return image


def empty(kind: type[Model], config: dict[str, Any], folder: Path) -> Model:
    """A model of diffusers without values: weights follow at once, and random ones would cost seconds for SD 1.x."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            model = kind.from_config(settings)
    except Exception as error:  # of as many kinds as there are ways to be wrong
        raise InputError(f"{folder / 'config.json'} describes no {kind.__name__}: {first_line(error)}") from None
    return model.to_empty(device="cpu")


def load_strictly(model: torch.nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Puts tensors into a model; raises InputError where one is missing, unknown or of another shape."""
    try:
        found = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{folder}: weights do not fit the configuration: {reason}") from None
    if found.missing_keys or found.unexpected_keys:
        missing, extra = found.missing_keys[:1], found.unexpected_keys[:1]
        raise InputError(f"{folder}: weights do not fit the configuration (missing {missing}, unknown {extra}, …)")


def _vae(base: Base) -> AutoencoderKL:
    folder = base.files["vae"][0].parent
    vae = empty(AutoencoderKL, base.configs["vae"], folder)
    old = re.compile(rf"(?<=attentions\.0\.)({'|'.join(_OLD_NAMES)})(?=\.)")
    tensors = weights.read(base.files["vae"])
    load_strictly(vae, {old.sub(lambda found: _OLD_NAMES[found[0]], name): x for name, x in tensors.items()}, folder)
    return vae


def _text_encoder(base: Base) -> CLIPTextModel:
    folder = base.folder / "text_encoder"
    try:
        config = CLIPTextConfig.from_dict(configuration.text_config(base.configs["text_encoder"]))
        with torch.device("meta"):
            CLIPTextModel(config)
    except InputError:
        raise
    except Exception as error:  # of as many kinds as there are ways to be wrong
        raise InputError(f"{folder / 'config.json'} describes no text encoder: {first_line(error)}") from None
    model, found = CLIPTextModel.from_pretrained(  # nosec B615  # of tensors that were read
        None,
        config=config,
        state_dict=weights.read(base.files["text_encoder"]),
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are refused below
        output_loading_info=True,
    )
    for fault in ("missing", "mismatched"):
        if names := [name if isinstance(name, str) else name[0] for name in found[f"{fault}_keys"]]:
            raise InputError(f"{folder}: weights do not fit the configuration ({fault} {sorted(names)[:1]}, …)")
    return model


def load_tokenizer(base: Base) -> CLIPTokenizer:
    """The tokenizer, told how many tokens the text encoder reads where it allows more, or says nothing."""
    folder, text = base.folder / "tokenizer", configuration.text_config(base.configs["text_encoder"])
    names = [file.name for file in folder.iterdir()]
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= {*names}:
        raise InputError(f"{folder} holds neither tokenizer.json nor vocab.json and merges.txt")
    for name in names:
        if name.endswith((".json", ".txt")):
            refuse_pointer(folder / name)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)  # nosec B615  # a folder
    except Exception as error:
        raise InputError(f"{folder} holds no CLIP tokenizer: {first_line(error)}") from None
    if len(tokenizer) > (known := text.get("vocab_size", 49408)):
        raise InputError(
            f"{base.folder}: tokenizer and text encoder do not belong together: {len(tokenizer)} tokens, "
            f"vocab_size = {known}"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, text.get("max_position_embeddings", 77))
    return tokenizer
