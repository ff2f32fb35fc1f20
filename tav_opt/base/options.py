"""What commands take of a base model and what is added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from tav_opt.config import Additions, BaseConfig

Loras = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(
        name="lora",
        metavar="FILE[:WEIGHT]",
        help="LoRA of diffusers, PEFT or kohya, or the folder that holds it, and how much of it; once per LoRA.",
    ),
]
Embeddings = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(
        name="embedding",
        metavar="FILE[:TOKEN]",
        help="Textual inversion and the word for it, the file's own unless given; once per file.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class AddedOptions(Additions):
    """As options of a command."""

    loras: Loras = ()
    embeddings: Embeddings = ()


@dataclass(frozen=True, kw_only=True)
class BaseOptions(AddedOptions, BaseConfig):
    """As options of a command."""


def moved(base: str | None, added: Additions) -> Additions | None:
    """Where a clip's base is now, as far as options say so."""
    if base is not None:
        return BaseConfig(model=base, **added.given())
    return added if added.given() else None
