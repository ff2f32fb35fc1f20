"""`tav-opt info`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from tav_opt.command import printable


@dataclass(frozen=True, kw_only=True)
class Info:
    """Tell what a checkpoint, an exported clip, a model repository or an edit is: made of what, how, how large."""

    path: Positional[Path]
    """Folder or file (MP4s, GIFs and PNGs by this program carry their settings), or the hub id of a clip."""
    json: bool = False
    """One JSON object instead of lines."""


def run(arguments: Sequence[str]) -> None:
    """Tell what a checkpoint, exported clip, repository or edit is, made with what, and the memory it needs."""
    args = tyro.cli(Info, prog="tav-opt info", args=arguments)
    from tav_opt.about import about

    facts = about(args.path)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
    else:
        print(*_lines(facts), sep="\n")


def _lines(facts: Mapping[str, Any], indent: str = "", *, bytes_all: bool = False) -> Iterator[str]:
    """`bytes_all`: of values that are all sizes."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        are_bytes = bytes_all or name.endswith("bytes")
        words = printable("size" if name == "bytes" else name.removesuffix("_bytes").replace("_", " "))
        if isinstance(value, Mapping):
            yield f"{indent}{words}:"
            yield from _lines(value, f"{indent}  ", bytes_all=are_bytes)
        elif are_bytes and type(value) in (int, float) and 0 <= value < 1e18:  # of strangers' files it may be anything
            size = f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value} bytes"
            yield f"{indent}{words:{width}}  {size}"
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{indent}{words:{width}}  {printable(text)}"
