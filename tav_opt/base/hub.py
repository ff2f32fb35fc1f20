"""Models and tuned clips of the Hugging Face hub: a repository is looked at first, only what is needed is fetched."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tav_opt import schemas
from tav_opt.base import configuration, weights
from tav_opt.config import InputError, first_line
from tav_opt.files import DESCRIPTION, read_object

_log = logging.getLogger(__name__)


def fetch(hub_id: str) -> Path:
    """The local snapshot of a repository: configurations first, weights when these are of a model that can be tuned.

    What is in the cache is not fetched again, and serves where the hub does not answer. Raises InputError.
    """
    try:
        sizes = _listed(hub_id)
    except Exception as error:  # the hub raises many kinds, and all of them mean the same here
        return _cached(hub_id, configuration.WEIGHED, error)
    if DESCRIPTION in sizes and "unet/config.json" not in sizes:
        base = read_object(_fetched(hub_id, [DESCRIPTION]) / DESCRIPTION).get("base")
        raise InputError(f"model {hub_id!r} is a tuned clip, not a base model: it was tuned on {str(base)[:200]!r}")
    described, folder = _configured(hub_id, sizes)
    needed = [file for part in configuration.WEIGHED for file in _weights(hub_id, folder, part, sizes)]
    _announce(f"model {hub_id}", hub_id, {file: sizes[file] for file in needed})
    return _fetched(hub_id, [*described, *needed])


def fetch_configurations(hub_id: str) -> Path:
    """The local snapshot of a Stable Diffusion's configurations and tokenizer, without weights; raises InputError.

    What is in the cache is not fetched again, and serves where the hub does not answer.
    """
    try:
        sizes = _listed(hub_id)
    except Exception as error:
        return _cached(hub_id, (), error)
    return _configured(hub_id, sizes)[1]


def _configured(hub_id: str, names: Collection[str]) -> tuple[list[str], Path]:
    """The files that say what a Stable Diffusion is, and the snapshot that holds them."""
    configuration.check_parts(names, hub_id)
    found = [name for name in names if name.split("/")[0] in configuration.PARTS and name.endswith((".json", ".txt"))]
    folder = _fetched(hub_id, found)
    configuration.check_configs(folder)
    return found, folder


def fetch_network(hub_id: str) -> Path:
    """The local snapshot of a repository that is one network of transformers, as CLIP is: its weights in one format.

    What is in the cache is not fetched again, and serves where the hub does not answer. Raises InputError.
    """
    try:
        sizes = _listed(hub_id)
    except Exception as error:
        return _cached(hub_id, ("",), error)
    described = [name for name in sizes if "/" not in name and name.endswith((".json", ".txt"))]
    folder = _fetched(hub_id, described)
    needed = _weights(hub_id, folder, "", [name for name in sizes if "/" not in name])
    _announce(f"model {hub_id}", hub_id, {file: sizes[file] for file in needed})
    return _fetched(hub_id, [*described, *needed])


def fetch_file(hub_id: str, name: str) -> Path:
    """One file of a repository; one in the cache is not fetched again. Raises InputError."""
    if isinstance(kept := try_to_load_from_cache(hub_id, name), str):
        return Path(kept)
    try:
        _announce(hub_id, hub_id, {name: _listed(hub_id)[name]})
    except Exception as error:
        raise InputError(
            f"{name} of {hub_id!r} is not in the cache, and the hub does not give it: {_reason(hub_id, error)}"
        ) from None
    return _fetched(hub_id, [name]) / name


def fetch_clip(hub_id: str) -> Path:
    """The local snapshot of a repository that `tav-opt push` made: a tuned clip, its description first.

    What is in the cache is not fetched again, and serves where the hub does not answer. Raises InputError.
    """
    try:
        sizes = _listed(hub_id)
    except Exception as error:
        return _cached(hub_id, (DESCRIPTION,), error)
    if DESCRIPTION not in sizes:
        raise InputError(f"{hub_id} is no tuned clip on the hub: it has no {DESCRIPTION}")
    folder = _fetched(hub_id, [DESCRIPTION])
    needed = _described(folder)
    if absent := [name for name in needed if name not in sizes]:
        raise InputError(f"{hub_id} lacks {absent[0]}, which its {DESCRIPTION} names")
    _announce(f"clip {hub_id}", hub_id, {name: sizes[name] for name in needed})
    return _fetched(hub_id, [DESCRIPTION, *needed])


def _described(folder: Path) -> list[str]:
    """The files of a clip, by its description."""
    found = read_object(folder / DESCRIPTION)
    schemas.check(schemas.ClipDescription, found, folder / DESCRIPTION)
    return list(found.get("files", {}))


def _listed(hub_id: str) -> dict[str, int]:
    """Names and bytes of the files of a repository; raises what the hub raises."""
    listed = HfApi().model_info(hub_id, files_metadata=True).siblings or ()
    return {file.rfilename: file.size or 0 for file in listed}


def _weights(hub_id: str, folder: Path, part: str, names: Collection[str]) -> list[str]:
    """The files of a part's weights, or of those beside all parts (""), all of them among `names`."""
    inner = f"{part}/" if part else ""
    inside = [name.removeprefix(inner) for name in names if name.startswith(inner)]
    chosen = weights.choose(inside, f"{hub_id}: {inner}" if part else hub_id)
    files = weights.shards(folder / part / chosen, inside) if chosen.endswith(".json") else [chosen]
    return [f"{inner}{file}" for file in files]


def _announce(what: str, hub_id: str, sizes: dict[str, int]) -> None:
    """Says what is about to be fetched, if anything is: gigabytes take their time."""
    absent = [name for name in sizes if not isinstance(try_to_load_from_cache(hub_id, name), str)]
    if absent:
        size = sum(sizes[name] for name in absent) / 1e9
        _log.warning("%s: fetching %.2f GB from the hub: %s", what, size, ", ".join(absent))


def _fetched(hub_id: str, names: list[str]) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=names))  # nosec B615  # a clip keeps its base's hash
    except Exception as error:
        raise InputError(f"{hub_id!r} cannot be fetched from the hub: {_reason(hub_id, error)}") from None


def _cached(hub_id: str, parts: Collection[str], error: Exception) -> Path:
    """The snapshot in the cache, if it is whole; raises InputError naming what the hub answered.

    The parts are folders with weights, of a Stable Diffusion, "" for a network by itself, DESCRIPTION for a clip.
    """
    what = "clip" if DESCRIPTION in parts else "model"
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=[]))  # nosec B615  # from the cache
    except Exception:
        raise InputError(
            f"{what} {hub_id!r} is no directory, and the hub does not give it: {_reason(hub_id, error)}"
        ) from None
    try:
        if DESCRIPTION in parts:
            _check_files(folder, _described(folder))
        else:
            if "" not in parts:
                configuration.check(folder)
            for part in parts:
                weights.files(folder / part)
    except InputError as lack:
        raise InputError(f"{lack} (in the cache; the hub does not answer: {_reason(hub_id, error)})") from None
    return folder


def _check_files(folder: Path, names: Collection[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}")


def _reason(hub_id: str, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"accept its terms at https://huggingface.co/{hub_id}, then `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no repository has this name, or it is private (`hf auth login`)"
    return first_line(error)
