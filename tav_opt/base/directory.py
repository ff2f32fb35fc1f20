"""A base model where it was found: one value travels from a path or a hub id to the loaded parts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tav_opt.base import configuration, weights
from tav_opt.base.loras import Lora
from tav_opt.base.single_file import config_folder
from tav_opt.base.textual_inversion import Embedding
from tav_opt.config import Additions, BaseConfig, InputError, PathLike
from tav_opt.files import read_object, sha256

_WORDS = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def resolve(path_or_hub_id: PathLike, *, network: bool = False) -> Path:
    """The local directory of a model: the path itself, or a snapshot of a Hugging Face repository.

    A Stable Diffusion, or one `network` of transformers or diffusers, as CLIP is. Raises InputError when it is neither.
    """
    path, name = Path(path_or_hub_id).expanduser(), os.fspath(path_or_hub_id)
    if path.is_dir():
        return path
    if path.suffix.lower() in (*configuration.SINGLE_FILES, *configuration.OTHER_FILES):
        wrong = "is a file, where a directory is needed" if path.is_file() else "does not exist"
        raise InputError(f"model {name} {wrong}")
    if path.exists() or len(path.parts) != 2 or path.is_absolute() or name.startswith("."):
        raise InputError(f"model {name!r} is neither a directory nor a hub id (owner/name)")
    from tav_opt.base import hub

    return (hub.fetch_network if network else hub.fetch)(path.as_posix())


@dataclass(frozen=True, kw_only=True)
class Base:
    """A Stable Diffusion whose configurations have been checked, and what is added to it."""

    path: Path
    """Its directory, or its single file."""
    folder: Path
    """Where its configurations and tokenizer are: the directory itself, unless it is a single file."""
    configs: dict[str, dict[str, Any]]
    """By part, as `configuration.check` gives them."""
    vae: Path | None = None
    """The folder of another VAE."""
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()

    @classmethod
    def at(cls, model: PathLike | BaseConfig | Base) -> Base:
        """Raises InputError for what is no such model, and for additions that are not there."""
        if isinstance(model, Base):
            return model
        asked = model if isinstance(model, BaseConfig) else BaseConfig(model=os.fspath(model))
        path = Path(asked.model).expanduser()
        if path.is_file() and path.suffix.lower() in configuration.SINGLE_FILES:
            folder = config_folder(path, asked.model_config)
        elif path.is_file() and path.suffix.lower() in configuration.OTHER_FILES:
            kinds = " and ".join(configuration.SINGLE_FILES)
            raise InputError(f"model {asked.model} is a file of a kind that is not read as a model: {kinds} are")
        elif asked.model_config is not None:
            raise InputError(f"model config {asked.model_config} is for single files, and {asked.model} is none")
        else:
            path = folder = resolve(asked.model)
        vae = None if asked.vae is None else _vae_folder(asked.vae)
        return cls(
            path=path,
            folder=folder,
            configs=configuration.check(folder, vae),
            vae=vae,
            loras=tuple(map(Lora.of, asked.loras)),
            embeddings=tuple(map(Embedding.of, asked.embeddings)),
        )

    @property
    def single(self) -> bool:
        """Whether it is a single file."""
        return self.path != self.folder

    @property
    def additions(self) -> dict[str, Any]:
        """What `config.Additions` are made of, with absolute paths: as a checkpoint keeps them."""
        return Additions(
            model_config=str(self.folder.resolve()) if self.single else None,
            loras=tuple(map(str, self.loras)),
            embeddings=tuple(map(str, self.embeddings)),
            vae=None if self.vae is None else str(self.vae.resolve()),
        ).given()

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """The files of each part's weights, a single file as the UNet's; raises InputError where one is not there."""
        vae = [] if self.vae is None else weights.files(self.vae)
        if self.single:
            return {"unet": [self.path], "vae": vae, "text_encoder": []}
        return {
            part: vae if part == "vae" and vae else weights.files(self.path / part) for part in configuration.WEIGHED
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256 over weights, configurations and additions: names the content, not its place."""
        digest = hashlib.sha256()
        for part, files in self.files.items():
            config = self.folder / part if part != "vae" or self.vae is None else self.vae
            for file in (config / "config.json", *files):
                digest.update(f"{part} {sha256(file)}\n".encode())
        digest.update(sha256(self.folder / "scheduler" / "scheduler_config.json").encode())
        words = self.folder / "tokenizer"
        if self.single:  # whose tokenizer comes from elsewhere
            further = [f"tokenizer {sha256(words / name)}" for name in _WORDS if (words / name).is_file()]
        else:
            further = _added_words(words)
        further += [lora.identity for lora in self.loras] + [embedding.identity for embedding in self.embeddings]
        digest.update("".join(f"\n{line}" for line in further).encode())
        return digest.hexdigest()

    @property
    def vae_factor(self) -> int:
        """Pixels of a side to one latent (8 for Stable Diffusion)."""
        return int(2 ** (len(self.configs["vae"].get("block_out_channels", "1")) - 1))

    @property
    def native_size(self) -> int:
        """Pixels of a side that the model was trained on; raises InputError where its UNet's configuration has none."""
        size, file = self.configs["unet"].get("sample_size"), self.folder / "unet" / "config.json"
        if not isinstance(size, int):
            raise InputError(f"{file}: sample_size = {size!r} is no number: give the size")
        return size * self.vae_factor


def _added_words(tokenizer: Path) -> list[str]:
    """The words that its files have beyond the vocabulary, with their numbers: textual inversions leave such.

    An ordinary tokenizer has none: what begins and ends a text is in the vocabulary.
    """

    def told(name: str) -> dict[str, Any]:
        return read_object(tokenizer / name) if (tokenizer / name).is_file() else {}

    whole, decoder = told("tokenizer.json"), told("tokenizer_config.json").get("added_tokens_decoder", {})
    try:
        known = {*told("vocab.json"), *whole.get("model", {}).get("vocab", {})}
        added = {(word, int(number)) for word, number in told("added_tokens.json").items()}
        added |= {(one["content"], int(one["id"])) for one in whole.get("added_tokens", [])}
        added |= {(one["content"], int(number)) for number, one in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{tokenizer} holds no CLIP tokenizer: its added tokens have another form") from None
    return [f"word {number} {word}" for word, number in sorted(added) if word not in known]


def _vae_folder(name: str) -> Path:
    """Of a VAE by itself, or in a Stable Diffusion directory."""
    folder = resolve(name, network=True)
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    if not (folder / "config.json").is_file():
        raise InputError(f"vae {name} holds no config.json: the directory of an AutoencoderKL is needed")
    return folder


def recorded_base(
    model: str, additions: Mapping[str, Any], moved: PathLike | Additions | None, expected_hash: str
) -> Base:
    """A clip's base as its description has it, or where its model (a path), or any of it (Additions), is now.

    Raises InputError when its content is not what was tuned on.
    """
    found: dict[str, Any] = {"model": model, **additions}
    if isinstance(moved, Additions):
        found |= moved.given()
    elif moved is not None:
        found["model"] = os.fspath(moved)
    return checked_base(BaseConfig(**found), expected_hash)


def checked_base(base: PathLike | BaseConfig | Base, expected_hash: str) -> Base:
    """A checkpoint's base model; raises InputError when its content is not what was tuned on."""
    found = Base.at(base)
    if found.hash != expected_hash:
        name = base.model if isinstance(base, BaseConfig) else found.path if isinstance(base, Base) else os.fspath(base)
        added = " with".join(["", ", ".join(found.additions)]) if found.additions else ""
        raise InputError(
            f"base {name}{added} has hash {found.hash[:12]}, but the clip was tuned on {expected_hash[:12]}: use that "
            "model, with the same LoRAs, embeddings and VAE"
        )
    return found
