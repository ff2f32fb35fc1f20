"""A tuned clip on disk: its own values, latents and description; and the reference's checkpoints, read as they are."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tav_opt.base.weights import check_finite, load_tensors
from tav_opt.clip_folder import ClipFolder
from tav_opt.config import InputError, PathLike, documented
from tav_opt.contract import ClipInfo
from tav_opt.files import DESCRIPTION, altered, sha256, whole, write_json

VALUES = "values.safetensors"
LATENTS = "latents.safetensors"
SOUND = "sound.mka"
"""Only where the source has one."""
MAX_BYTES = 4 << 30
"""Of a file of tensors; those of a clip on Stable Diffusion 1.x have 149 MB in fp16."""
_KINDS = (torch.float16, torch.bfloat16, torch.float32)


@documented
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
    sound: bytes | None = None
    """That of the frames' time, as a Matroska file."""


def save(
    checkpoint: Checkpoint, folder: PathLike, settings: dict[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """Writes a checkpoint; its description comes last, so a folder that has one is whole."""
    folder = Path(folder)
    values = {name: value.detach().to("cpu", dtype).contiguous() for name, value in checkpoint.values.items()}
    latents = {"source": checkpoint.source_latents, "inverted": checkpoint.inverted_latents}
    save_tensors(values, folder / VALUES)
    save_tensors({name: value.cpu().float().contiguous() for name, value in latents.items()}, folder / LATENTS)
    hashes = {name: sha256(folder / name) for name in (VALUES, LATENTS, *save_sound(checkpoint.sound, folder))}
    write_json(folder / DESCRIPTION, {**checkpoint.info.to_json(), "files": hashes, "settings": settings})


def save_sound(sound: bytes | None, folder: PathLike) -> list[str]:
    """Writes it, where there is one → its file's name; that of a clip before goes."""
    path = Path(folder) / SOUND
    if sound is None:
        path.unlink(missing_ok=True)
        return []
    with whole(path) as temporary:
        temporary.write_bytes(sound)
    return [SOUND]


def load(folder: PathLike | ClipFolder) -> Checkpoint:
    """Reads and verifies a checkpoint, or an exported clip (tensors in the dtype they have on disk).

    Raises InputError when the folder is no checkpoint, half-written, or altered.
    """
    clip = ClipFolder.at(folder)
    info = clip.info
    for name in (VALUES, LATENTS, SOUND):
        _check_size(clip.path / name)
    known = dict.fromkeys((VALUES, LATENTS), "") | clip.description.get("files", {})
    if changed := altered(clip.path, known):
        raise InputError(f"{clip.path / changed[0]} is missing or altered: its hash is not the one in {clip.file}")
    sound = (clip.path / SOUND).read_bytes() if SOUND in known else None
    return replace(_read(clip.path, info), sound=sound)


def _check_size(path: Path) -> None:
    if path.is_file() and (size := path.stat().st_size) > MAX_BYTES:  # hashing it would take long
        raise InputError(f"{path} has {size} bytes: the tensors of a clip have {MAX_BYTES} at most")


def _read(folder: Path, info: ClipInfo) -> Checkpoint:
    """The values and latents of a clip in a folder that was found unaltered.

    Raises InputError for tensors that are missing, of another kind than float16, bfloat16 or float32, NaN or infinite,
    and for latents that are not of the described clip.
    """
    values, latents = load_tensors(folder / VALUES), load_tensors(folder / LATENTS)
    if lacking := {"source", "inverted"} - set(latents):
        raise InputError(f"{folder / LATENTS} lacks the {' and '.join(sorted(lacking))} latents")
    for tensors, file in ((values, VALUES), (latents, LATENTS)):
        for name, value in tensors.items():
            if value.dtype not in _KINDS:
                kind = str(value.dtype).removeprefix("torch.")
                raise InputError(f"{folder / file}: {name} is {kind}, not float32, float16 or bfloat16")
        check_finite(tensors, folder / file)
    for name in ("source", "inverted"):
        _check_latents(latents[name], info, f"{folder / LATENTS}: the {name} latents")
    if latents["source"].shape != latents["inverted"].shape:
        raise InputError(f"{folder / LATENTS}: the source and inverted latents differ in shape")
    return Checkpoint(info=info, values=values, source_latents=latents["source"], inverted_latents=latents["inverted"])


def _check_latents(latents: Tensor, info: ClipInfo, name: str) -> None:
    """Raises InputError unless they are (1, c, f, h, w), a whole number of pixels to each."""
    shape = tuple(latents.shape)
    fits = len(shape) == 5 and shape[0] == 1 and min(shape) > 0 and shape[2] == info.frames
    factor = info.height // shape[3] if fits else 0
    if not fits or (shape[3] * factor, shape[4] * factor) != (info.height, info.width):
        clip = f"{info.frames} frames of {info.width}×{info.height}"
        raise InputError(f"{name} are {shape}, not (1, c, f, h, w) of the described {clip}")


def is_checkpoint(folder: PathLike) -> bool:
    """Whether the folder holds a finished checkpoint of ours, or an exported clip."""
    return ClipFolder.found(folder) is not None


def save_tensors(tensors: dict[str, Tensor], path: PathLike, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all; raises InputError when the disk is full."""
    with whole(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # it hides the operating system's error in its text
            found = re.search(r"os error (\d+)", str(error))
            raise OSError(int(found[1]) if found else 0, str(error)) from None
