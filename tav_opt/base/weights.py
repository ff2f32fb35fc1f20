"""The weights of one part of a model as people have them: safetensors or .bin, one file or shards, float32 or half."""

from __future__ import annotations

import pickle  # nosec B403  # for the name of its error
import re
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tav_opt.config import InputError, PathLike
from tav_opt.files import read_object, refuse_pointer

_STEMS = {
    "safetensors": ("diffusion_pytorch_model", "model"),
    "bin": ("diffusion_pytorch_model", "pytorch_model"),
}
_HALVES = (".fp16", ".bf16")
_LOOKS_LIKE_WEIGHTS = re.compile(r"\.(safetensors|bin|ckpt|pth?|msgpack|h5|onnx|gguf)\b|-of-\d+|\.incomplete$")


def choose(names: Collection[str], folder: str | Path) -> str:
    """The file to read among those of a part, or the index of its shards: float32 before half, safetensors before bin.

    A half is taken only where there is nothing else, as diffusers does: what was tuned on keeps its hash. Raises
    InputError where there are no weights; `folder` is for its message.
    """
    for name in _candidates():
        if name in names:
            return name
    plain = dict.fromkeys(f"{stem}.{kind}" for kind, stems in _STEMS.items() for stem in stems)
    others = sorted(name for name in names if _LOOKS_LIKE_WEIGHTS.search(name))
    found = f"; {', '.join(others[:3])} cannot be taken for them" if others else ""
    raise InputError(f"{folder} holds no weights ({', '.join(plain)}, or shards and their index){found}")


def _candidates() -> Iterator[str]:
    for half in ("", *_HALVES):
        for kind, stems in _STEMS.items():
            for stem in stems:
                yield f"{stem}{half}.{kind}"
                yield f"{stem}{half}.{kind}.index.json"
                yield f"{stem}.{kind}.index{half}.json"  # as diffusers wrote it at first


def is_half(name: str) -> bool:
    """Whether a file of weights says by its name that they are of half precision."""
    return any(f"{half}." in name for half in _HALVES)


def files(folder: Path) -> list[Path]:
    """The files that hold a part's weights, the index of shards first; raises InputError where one is not there."""
    names = [path.name for path in folder.iterdir()]
    found = [folder / choose(names, folder)]
    if found[0].suffix == ".json":
        found += [folder / name for name in shards(found[0], names)]
    for file in found:
        refuse_pointer(file)
    return found


def shards(index: Path, names: Collection[str]) -> list[str]:
    """The files that an index lists, all of them among `names`, which lie beside it; raises InputError where not."""
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or any(name != Path(str(name)).name for name in listed.values()):
        raise InputError(
            f"{index} is no index of weights: weight_map does not say which file beside it has which tensor"
        )
    found = sorted(set(listed.values()))
    for name in found:
        if name not in names:
            raise InputError(f"{index.parent} lacks {name}, one of the {len(found)} shards that {index.name} names")
    return found


def read(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of a part, of whose weights `files` tells, all shards together.

    Raises InputError for files that are missing, corrupt or hold more than tensors, and for values that are no numbers.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix != ".json":
            tensors |= load_finite(file)
    return tensors


def load_tensors(path: PathLike) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.bin` file, from which nothing but tensors is unpickled.

    Raises InputError when the file is corrupt or holds anything else.
    """
    path = Path(path)
    tensors = load_any(path)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{path} is not a dictionary of tensors")
    return tensors


def load_finite(path: Path) -> dict[str, Tensor]:
    """As `load_tensors`; raises InputError for values that are no numbers too."""
    tensors = load_tensors(path)
    check_finite(tensors, path)
    return tensors


def load_single(path: Path) -> dict[str, Tensor]:
    """The tensors of a single-file checkpoint, which trainers save beside what they noted of the training."""
    found = load_any(path)
    while isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a dictionary of tensors")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    check_finite(tensors, path)
    return tensors


def load_any(path: Path) -> Any:
    """What a file of tensors holds, be it nested; nothing but tensors, numbers and texts is unpickled.

    Raises InputError when the file is corrupt or holds anything else.
    """
    _check_head(path)
    try:
        return load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
    except SafetensorError as error:
        raise InputError(f"{path} is corrupt or cut short: {error}") from None
    except pickle.UnpicklingError as error:  # whose advice is to unpickle all the same
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds more than tensors ({found[1]})" if found else "is corrupt, or holds more than tensors"
        raise InputError(f"{path} {what}, and nothing else is ever unpickled: have it saved as safetensors") from None
    except Exception:  # of many kinds, and advice to unpickle among them
        raise InputError(f"{path} is corrupt, or no file of tensors that PyTorch saved: fetch it again") from None


def _unpickled(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of archives that are then refused
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_head(path: Path) -> None:
    """Raises InputError for a file whose first bytes say that it is something else."""
    head = refuse_pointer(path)
    if not head:
        raise InputError(f"{path} is empty: fetch it again")
    if head.lstrip()[:1] in (b"<", b"{"):
        raise InputError(f"{path} is text, such as a server's page, and no weights: fetch it again")
    safe = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    if path.suffix == ".safetensors" and head[:2] in (b"PK", b"\x80\x02"):
        raise InputError(f"{path} is what PyTorch saves, not safetensors: it should end in .bin")
    if path.suffix != ".safetensors" and safe:
        raise InputError(f"{path} is safetensors by its content: it should end in .safetensors")


def check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises InputError naming the first tensor that holds NaN or infinity.

    A sum tells it at the speed of memory; only where the sum itself runs over are the values looked at one by one.
    """
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        wide = value.half() if value.itemsize == 1 else value  # float8 has no arithmetic
        if not wide.sum().isfinite() and (bad := int((~wide.isfinite()).sum())):
            raise InputError(
                f"{path}: {bad} of the {value.numel()} values of {name} are NaN or infinite: the file is broken, "
                "take another copy or variant of it"
            )
