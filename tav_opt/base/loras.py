"""LoRAs as people have them, fused into an image model by diffusers and PEFT (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tav_opt.base import weights
from tav_opt.config import InputError, first_line
from tav_opt.files import read_object, sha256

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT name the file in a folder that they save."""
ADAPTER = "adapter_config.json"
"""PEFT's, beside its file: the strength is in it."""
_PEFT = "base_model.model."
_NAME = "one"
"""Of the adapter while it is being fused."""
_MAX_WEIGHT = 100.0


@dataclass(frozen=True)
class Lora:
    """A file of low-rank updates, and how much of them is added."""

    file: Path
    weight: float

    @classmethod
    def of(cls, text: str) -> Lora:
        """`FILE[:weight]`, or a folder that holds such a file; raises InputError for what is neither."""
        name, weight = text, 1.0
        if not Path(text).expanduser().exists() and ":" in text:
            name, _, given = text.rpartition(":")
            try:
                weight = float(given)
            except ValueError:
                raise InputError(f"lora {text!r}: neither a file nor FILE:weight ({given!r} is no number)") from None
        if not math.isfinite(weight) or abs(weight) > _MAX_WEIGHT:
            raise InputError(f"lora {text!r}: weight {weight} is not within -{_MAX_WEIGHT:g}…{_MAX_WEIGHT:g}")
        file = Path(name).expanduser()
        if file.is_dir():
            found = [file / one for one in FILES if (file / one).is_file()]
            if not found:
                raise InputError(f"lora {name} holds neither {' nor '.join(FILES)}: give the file itself")
            file = found[0]
        if not file.is_file():
            raise InputError(f"lora {name} does not exist")
        return cls(file, weight)

    def __str__(self) -> str:
        return f"{self.file.resolve()}:{self.weight!r}"

    @property
    def identity(self) -> str:
        """Another for every other content or weight."""
        beside = self.file.with_name(ADAPTER)
        strength = sha256(beside) if beside.is_file() and _is_peft(weights.load_tensors(self.file)) else ""
        return f"lora {sha256(self.file)} {strength} {self.weight!r}"


def fuse(pipeline: Any, loras: tuple[Lora, ...]) -> None:
    """Adds the LoRAs to the UNet and text encoder of a diffusers pipeline for good, one after the other.

    Raises InputError for a file that is none, or of which anything finds no place in this model, and where PEFT is not
    installed.
    """
    if not loras:
        return
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError(f"lora {loras[0].file} needs peft: pip install 'tav-opt[lora]'") from None
    for lora in loras:
        _fuse(pipeline, lora)


def _fuse(pipeline: Any, lora: Lora) -> None:
    keys = sorted(weights.load_finite(lora.file))
    try:
        with _silent():
            state, alphas, metadata = _state(pipeline, lora)
            _check_keys(state, lora.file)
            parts = [part for part in ("unet", "text_encoder") if any(key.startswith(f"{part}.") for key in state)]
            told: dict[str, Any] = {"network_alphas": alphas, "metadata": metadata, "adapter_name": _NAME}
            if "unet" in parts:
                pipeline.load_lora_into_unet(state, unet=pipeline.unet, **told)
            if "text_encoder" in parts:
                text_encoder = pipeline.text_encoder
                pipeline.load_lora_into_text_encoder(state, text_encoder=text_encoder, prefix="text_encoder", **told)
            for part in parts:
                _check_placed(getattr(pipeline, part), part, state, lora.file)
            pipeline.fuse_lora(parts, lora_scale=lora.weight, safe_fusing=True)
            pipeline.unload_lora_weights()
    except InputError:
        raise
    except Exception as error:  # of as many kinds as there are ways not to fit
        lines = str(error).strip().splitlines()
        reason = lines[1].strip() if len(lines) > 1 and lines[0].endswith(":") else first_line(error)
        raise InputError(f"lora {lora.file} does not fit this model: {reason} ({_named(keys)})") from None


@contextmanager
def _silent() -> Iterator[None]:
    """What does not fit is said once, and in one line."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _state(pipeline: Any, lora: Lora) -> tuple[dict[str, Any], dict[str, float] | None, dict[str, Any] | None]:
    """Its tensors under diffusers' names, kohya's strengths, and what the file says of itself."""
    tensors = weights.load_tensors(lora.file)
    if dora := [key for key in tensors if "dora_scale" in key or "lora_magnitude_vector" in key]:
        raise InputError(f"lora {lora.file} is a DoRA ({_named(dora)}), which diffusers does not read")
    if _is_peft(tensors):
        return _of_peft(tensors, lora.file)
    state, alphas, _ = pipeline.lora_state_dict(dict(tensors), return_lora_metadata=True)
    return state, alphas, _told(lora.file)


def _is_peft(tensors: Collection[str]) -> bool:
    """Whether names of tensors are PEFT's, which keeps the strength beside the file."""
    return any(name.startswith(_PEFT) for name in tensors)


def _told(file: Path) -> dict[str, Any] | None:
    """The settings that diffusers writes into the file's head."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    if file.suffix != ".safetensors":
        return None
    with safe_open(file, "pt") as opened:
        found = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    return json.loads(found) if found else None


def _of_peft(tensors: dict[str, Any], file: Path) -> tuple[dict[str, Any], None, dict[str, Any]]:
    """What PEFT saved of one network, a UNet or a text encoder, which its names tell."""
    beside = file.with_name(ADAPTER)
    if not beside.is_file():
        raise InputError(f"lora {file} was saved by PEFT, and its strength is in {ADAPTER}, which is not beside it")
    config = read_object(beside)
    part = "unet" if any("_blocks." in key or "mid_block." in key for key in tensors) else "text_encoder"
    state = {f"{part}.{key.removeprefix(_PEFT)}": value for key, value in tensors.items()}
    return state, None, {f"{part}.{name}": value for name, value in config.items()}


def _check_keys(state: dict[str, Any], file: Path) -> None:
    foreign = sorted(key for key in state if not key.startswith(("unet.", "text_encoder.")))
    if any(key.startswith("text_encoder_2.") for key in foreign):
        raise InputError(f"lora {file} is for Stable Diffusion XL ({_named(foreign)}): it has a second text encoder")
    if foreign or not state:
        raise InputError(f"lora {file} has keys that match nothing in Stable Diffusion 1.x and 2.x: {_named(foreign)}")


def _check_placed(model: Any, part: str, state: dict[str, Any], file: Path) -> None:
    """Raises InputError where not every tensor of the file has found its place, naming some that have not."""
    from peft import get_peft_model_state_dict

    asked = [key for key in state if key.startswith(f"{part}.") and not key.endswith("alpha")]
    placed = len(get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False))
    if placed < len(asked):
        modules = {name for name, _ in model.named_modules()}
        lost = [key for key in asked if not _module(key) & modules] or asked
        raise InputError(f"lora {file}: {len(lost)} of its keys match nothing in this model's {part}: {_named(lost)}")
    if placed > len(asked):
        raise InputError(f"lora {file} is not whole: {placed - len(asked)} of the halves of its {part}'s are missing")


def _module(key: str) -> set[str]:
    """The names that the module which a key is of may have in the model."""
    inner = key.split(".", 1)[1].split(".lora")[0].split(".processor")[0]
    return {inner, inner.removeprefix("text_model.")}


def _named(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f", … {len(keys)} in all" if len(keys) > 3 else "")
