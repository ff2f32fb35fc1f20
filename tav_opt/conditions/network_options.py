"""What commands take of networks that follow maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from tav_opt.config import InputError
from tav_opt.contract import CLIP_NAME

Several = UseAppendAction[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What follows maps."""

    controlnet: Annotated[
        Several, arg(metavar="NAME=PLACE", help="ControlNet: directory, hub id or single file; once per network.")
    ] = ()
    adapter: Annotated[Several, arg(metavar="NAME=PLACE", help="T2I-Adapter: directory or hub id; once per one.")] = ()


def named(option: str, given: Sequence[str], kind: str) -> dict[str, str]:
    """NAME=VALUE by name; raises InputError for what is none, and for a name that is given twice."""
    found: dict[str, str] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not value or not CLIP_NAME.match(name):
            raise InputError(f"--{option} {one!r} is not NAME={kind}, as pose=…; names are a-z 0-9 _ -")
        if name in found:
            raise InputError(f"--{option} gives {name!r} twice")
        found[name] = value
    return found
