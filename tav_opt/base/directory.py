"""A base model where it was found: one value travels from a path or a hub id to the loaded parts."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tav_opt.base import configuration, weights
from tav_opt.config import InputError, PathLike
from tav_opt.files import sha256


def resolve(path_or_hub_id: PathLike, *, network: bool = False) -> Path:
    """The local directory of a model: the path itself, or a snapshot of a Hugging Face repository.

    A Stable Diffusion, or one `network` of transformers, as CLIP is. Raises InputError when it is neither.
    """
    path, name = Path(path_or_hub_id).expanduser(), os.fspath(path_or_hub_id)
    if path.is_dir():
        return path
    if path.suffix.lower() in configuration.SINGLE_FILES and not network:
        raise InputError(f"model {configuration.convert(name)}")
    if path.exists() or len(path.parts) != 2 or path.is_absolute() or name.startswith("."):
        raise InputError(f"model {name!r} is neither a directory nor a hub id (owner/name)")
    from tav_opt.base import hub

    return (hub.fetch_network if network else hub.fetch)(path.as_posix())


@dataclass(frozen=True)
class Base:
    """A Stable Diffusion directory whose configurations have been checked."""

    path: Path
    configs: dict[str, dict[str, Any]]
    """By part, as `configuration.check` gives them."""

    @classmethod
    def at(cls, path_or_hub_id: PathLike | Base) -> Base:
        """Raises InputError for what is no such model."""
        if isinstance(path_or_hub_id, Base):
            return path_or_hub_id
        path = resolve(path_or_hub_id)
        return cls(path, configuration.check(path))

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """The files of each part's weights; raises InputError where one is not there."""
        return {part: weights.files(self.path / part) for part in configuration.WEIGHED}

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the weights and configurations: names the content, not its place."""
        digest = hashlib.sha256()
        for part, files in self.files.items():
            for file in (self.path / part / "config.json", *files):
                digest.update(f"{part} {sha256(file)}\n".encode())
        digest.update(sha256(self.path / "scheduler" / "scheduler_config.json").encode())
        return digest.hexdigest()

    @property
    def vae_factor(self) -> int:
        """Pixels of a side to one latent (8 for Stable Diffusion)."""
        return int(2 ** (len(self.configs["vae"].get("block_out_channels", "1")) - 1))

    @property
    def native_size(self) -> int:
        """Pixels of a side that the model was trained on; raises InputError where its UNet's configuration has none."""
        size, file = self.configs["unet"].get("sample_size"), self.path / "unet" / "config.json"
        if not isinstance(size, int):
            raise InputError(f"{file}: sample_size = {size!r} is no number: give the size")
        return size * self.vae_factor


def checked_base(base: PathLike, expected_hash: str) -> Base:
    """A checkpoint's base model; raises InputError when its content is not what was tuned."""
    found = Base.at(base)
    if found.hash != expected_hash:
        wrong = f"base {os.fspath(base)} has hash {found.hash[:12]}"
        raise InputError(f"{wrong}, but the clip was tuned on {expected_hash[:12]}: use that model")
    return found
