"""Which GPUs the server edits on: how they are named, and whether they are there."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from tyro.constructors import PrimitiveConstructorSpec

from tav_opt.config import InputError


def _read(words: list[str]) -> tuple[int, ...]:
    return tuple(int(number) for number in words[0].split(","))


Gpus = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT,…",
        instance_from_str=_read,
        is_instance=lambda found: isinstance(found, tuple),
        str_from_instance=lambda numbers: [",".join(map(str, numbers))],
    ),
]
"""On the command line with commas: 0,1."""


def present() -> Collection[int]:
    """Those that PyTorch sees, which is what edits."""
    import torch

    return range(torch.cuda.device_count())


def check(asked: tuple[int, ...]) -> None:
    """Raises InputError for GPUs that are not there, naming those that are, and for one that is named twice."""
    if not asked:
        return
    there, told = present(), f"gpus {','.join(map(str, asked))}"
    if not there:
        raise InputError(f"{told}: PyTorch sees no GPU on this machine; without --gpus the processor edits")
    if absent := [number for number in asked if number not in there]:
        raise InputError(f"{told}: there is no GPU {absent[0]}; there are {', '.join(map(str, there))}")
    if len(set(asked)) < len(asked):
        raise InputError(f"{told}: one is named twice; --instances gives a GPU several instances")
