"""A tuned clip on disk: its own values, latents and description; and the reference's checkpoints, read as they are."""

from __future__ import annotations

import hashlib
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tav_opt.config import InputError
from tav_opt.contract import ClipInfo
from tav_opt.files import DESCRIPTION, check_checkpoint, read_json, sha256, whole, write_json

VALUES = "values.safetensors"
LATENTS = "latents.safetensors"
_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What tuning makes of a clip."""

    info: ClipInfo
    values: dict[str, Tensor]
    """The clip's own values by their parameter names."""
    source_latents: Tensor
    """(1, c, f, h, w), scaled."""
    inverted_latents: Tensor
    """(1, c, f, h, w): DDIM inversion of the source with the tuned UNet under the empty prompt."""


def save(checkpoint: Checkpoint, folder: Path, settings: dict[str, Any], dtype: torch.dtype = torch.float16) -> None:
    """Writes a checkpoint; its description comes last, so a folder that has one is whole."""
    values = {name: value.detach().to("cpu", dtype).contiguous() for name, value in checkpoint.values.items()}
    latents = {"source": checkpoint.source_latents, "inverted": checkpoint.inverted_latents}
    save_tensors(values, folder / VALUES)
    save_tensors({name: value.cpu().float().contiguous() for name, value in latents.items()}, folder / LATENTS)
    hashes = {name: sha256(folder / name) for name in (VALUES, LATENTS)}
    write_json(folder / DESCRIPTION, {**checkpoint.info.to_json(), "files": hashes, "settings": settings})


def load(folder: Path) -> Checkpoint:
    """Reads and verifies a checkpoint (tensors in the dtype they have on disk).

    Raises InputError when the folder is no checkpoint, half-written, or altered.
    """
    check_checkpoint(folder)
    description = read_json(folder / DESCRIPTION)
    for name in (VALUES, LATENTS):
        if not (folder / name).is_file() or sha256(folder / name) != description.get("files", {}).get(name):
            raise InputError(f"{folder / name} is missing or altered: its hash is not the one in {DESCRIPTION}")
    latents = load_tensors(folder / LATENTS)
    return Checkpoint(
        info=ClipInfo.from_json(description),
        values=load_tensors(folder / VALUES),
        source_latents=latents["source"],
        inverted_latents=latents["inverted"],
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a finished checkpoint of ours."""
    return (folder / DESCRIPTION).is_file()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all; raises InputError when the disk is full."""
    with whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # it hides the operating system's error in its text
            found = re.search(r"os error (\d+)", str(error))
            raise OSError(int(found[1]) if found else 0, str(error)) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.bin` file, from which nothing but tensors is unpickled.

    Raises InputError when the file is corrupt or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is corrupt, or holds more than tensors: {reason}") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path} is not a dictionary of tensors")
    return tensors


def weights_file(folder: Path) -> Path:
    """The weights of one part of a model directory, safetensors first; raises InputError where there are none."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} holds no weights ({', '.join(_WEIGHTS)})")


def is_reference_unet(config: dict[str, Any]) -> bool:
    """Whether a UNet's configuration is of one that the reference implementation saved."""
    return config.get("_class_name") == "UNet3DConditionModel"


def image_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the image UNet that the reference inflated: block names say 2D, not 3D."""

    def flat(value: Any) -> Any:
        if isinstance(value, list):
            return [flat(item) for item in value]
        return value.replace("3D", "2D") if isinstance(value, str) else value

    return {key: flat(value) for key, value in config.items()}


def base_hash(directory: Path) -> str:
    """SHA-256 over the weights and configurations of a Stable Diffusion directory: names its content, not its place."""
    digest = hashlib.sha256()
    for part in ("unet", "vae", "text_encoder"):
        for file in (directory / part / "config.json", weights_file(directory / part)):
            digest.update(f"{part} {sha256(file)}\n".encode())
    digest.update(sha256(directory / "scheduler" / "scheduler_config.json").encode())
    return digest.hexdigest()
