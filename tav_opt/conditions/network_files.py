"""Networks that follow maps, from where people have them: a directory of diffusers, a hub id, a single file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tav_opt.base import directory, weights
from tav_opt.base.image_model import empty, load_strictly
from tav_opt.config import InputError, PathLike
from tav_opt.files import read_object, sha256

N = TypeVar("N", bound=nn.Module)


def found(place: PathLike) -> Path:
    """The directory of a network, or its single file; of a hub id the snapshot, which is fetched.

    Raises InputError where nothing is.
    """
    file = Path(place).expanduser()
    return file if file.is_file() else directory.resolve(place, network=True)


def settings_of(path: Path, kind: str) -> dict[str, Any] | None:
    """The configuration in a directory, None of a single file; raises InputError where it is of another kind."""
    if path.is_file():
        return None
    config = read_object(path / "config.json")
    if config.get("_class_name") != kind:
        raise InputError(f"{path} is a {str(config.get('_class_name'))[:60]!r}, not a {kind}")
    return config


def check_same(place: Path, config: Mapping[str, Any], unet: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises InputError for a network whose settings are not those of the UNet, naming the first."""
    for name in names:
        one, other = (_plain(settings.get(name)) for settings in (config, unet))
        if one is not None and one != other:
            raise InputError(f"{place} is for another base: its {name} is {one}, the base's {other}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def filled(kind: Any, config: dict[str, Any], path: Path) -> Any:
    """A network of diffusers with the weights of its directory, all of them; raises InputError."""
    net = empty(kind, config, path)
    load_strictly(net, weights.read(weights.files(path)), path)
    return net


def content(path: Path) -> str:
    """Another for every other network, wherever it lies."""
    files = [path] if path.is_file() else [path / "config.json", *weights.files(path)]
    return " ".join(sha256(file) for file in files)
