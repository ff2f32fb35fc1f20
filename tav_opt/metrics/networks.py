"""Networks of transformers from a directory, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor

from tav_opt.base import weights
from tav_opt.config import InputError, first_line

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Where a directory says how its network wants pictures."""


def load_network(kind: Any, folder: Path, *, device: str | torch.device = "cpu", spare: str | None = None) -> Any:
    """A network of a class of transformers, in float32, ready to be asked.

    Raises InputError where its files are missing or corrupt, or lack values, which transformers would draw at random;
    those of a part that nobody uses, `spare`, may lack.
    """
    weights.files(folder)
    try:
        model, about = kind.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # of many kinds
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from None
    if lacking := sorted(name for name in about["missing_keys"] if name.split(".")[0] != spare):
        raise InputError(f"{folder} is no {type(model).__name__}: its weights lack {lacking[0]}, {len(lacking)} in all")
    return model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)


def load_processor(folder: Path, size: int) -> Any:
    """What makes a network's input of pictures, as the directory says; CLIP's own at `size` pixels where it is silent.

    PickScore's repository is silent: it is used with the processor of the CLIP that it was trained from.
    """
    if any((folder / name).is_file() for name in PROCESSORS):
        return AutoImageProcessor.from_pretrained(folder)  # nosec B615  # a local folder
    from transformers import CLIPImageProcessor  # whose import warns where torchvision is not installed

    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
