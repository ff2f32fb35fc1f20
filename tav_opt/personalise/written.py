"""What personalising leaves: a diffusers directory, or a LoRA as diffusers saves it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor

from tav_opt.base.directory import Base
from tav_opt.base.image_model import ImageModel
from tav_opt.base.loras import FILES
from tav_opt.files import discard, whole, write_json

DESCRIPTION = "personalised.json"
"""Written last: a folder that has one is whole."""


def model(base: Base, trained: Mapping[str, Tensor], out: Path) -> None:
    """The base with what was trained (by part and name) in float32, each part whole; what did not train is its own."""
    image = ImageModel.load(base)
    own = image.parameters()
    for name, value in trained.items():
        own[name].data.copy_(value.data)
    pipeline = image.pipeline(base)
    for name, part in pipeline.components.items():
        if part is not None:
            discard(out / name)
            with whole(out / name) as temporary:
                part.save_pretrained(temporary)
    # diffusers' scheduler has other settings than it was given: a clip's schedule would be another.
    write_json(out / "scheduler" / "scheduler_config.json", base.configs["scheduler"])
    with whole(out / "model_index.json") as temporary:
        pipeline.save_config(temporary.parent)


def lora(image: ImageModel, text_encoder: bool, out: Path) -> None:
    """The LoRAs of the UNet, and of the text encoder if it was trained, with their strength in the file's head."""
    from peft import get_peft_model_state_dict

    options: dict[str, Any] = {}
    for name, part in {"unet": image.unet, "text_encoder": image.text_encoder if text_encoder else None}.items():
        if part is not None:
            found = get_peft_model_state_dict(part, save_embedding_layers=False)
            options[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(found)
            options[f"{name}_lora_adapter_metadata"] = part.peft_config["default"].to_dict()
    with whole(out / FILES[0]) as temporary:
        StableDiffusionPipeline.save_lora_weights(temporary.parent, weight_name=temporary.name, **options)
