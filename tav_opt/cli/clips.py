"""`tav-opt clips list|add|pull|remove|verify`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, subcommand

from tav_opt.base.options import AddedOptions, moved
from tav_opt.command import printable

if TYPE_CHECKING:
    from tav_opt.repository.clips import Clip
    from tav_opt.repository.pulling import Pulled

REPOSITORY = Path("serving/model_repository")


@dataclass(frozen=True, kw_only=True)
class ListClips:
    """Names, frames, sizes, bases and captions of the exported clips."""

    repository: Path = REPOSITORY


@dataclass(frozen=True, kw_only=True)
class AddClip:
    """Export a tuned clip; where its base is there in its size, its values are copied and no graph is exported."""

    checkpoint: Positional[Path]
    """Folder that `tav-opt tune` wrote, or the hub id of a clip."""
    repository: Path = REPOSITORY
    name: str | None = None
    """The clip's name there (the checkpoint folder's)."""
    base: str | None = None
    """The base model, where it has moved; so are the next four what was added to it."""
    additions: OmitArgPrefixes[AddedOptions] = field(default_factory=AddedOptions)


@dataclass(frozen=True, kw_only=True)
class PullClips:
    """Fetch the clips of a model repository that lies elsewhere, with their bases; what is here already stays."""

    url: Positional[str]
    """Any that fsspec reads: s3://bucket/folder (pip install s3fs), gs://… (gcsfs), hf://owner/name/folder, file:///…"""
    repository: Path = REPOSITORY


@dataclass(frozen=True, kw_only=True)
class RemoveClips:
    """Remove clips, and bases that no clip needs any more."""

    names: Positional[tuple[str, ...]]
    repository: Path = REPOSITORY


@dataclass(frozen=True, kw_only=True)
class VerifyClips:
    """Compare all files of clips, bases and engines with the hashes kept with them; exit status 1 where one differs."""

    repository: Path = REPOSITORY


def run(arguments: Sequence[str]) -> int:
    """List, add, pull, remove or verify exported clips."""
    args = tyro.cli(
        Annotated[ListClips, subcommand("list")]
        | Annotated[AddClip, subcommand("add")]
        | Annotated[PullClips, subcommand("pull")]
        | Annotated[RemoveClips, subcommand("remove")]
        | Annotated[VerifyClips, subcommand("verify")],
        prog="tav-opt clips",
        args=arguments,
    )
    from tav_opt.repository import clips

    match args:
        case ListClips():
            damaged = []
            found = clips.clips(args.repository, on_damaged=lambda name, error: damaged.append(f"{name}: {error}"))
            print(*map(_described, found), sep="\n", end="\n" * bool(found))
            if not found and not damaged:
                print(f"tav-opt clips: {args.repository} has none: see --repository and `add`", file=sys.stderr)
            print(*(f"tav-opt clips: {line}" for line in damaged), sep="\n", end="\n" * bool(damaged), file=sys.stderr)
            return 1 if damaged else 0
        case AddClip():
            from tav_opt.export.exporting import add

            added = add(args.checkpoint, args.repository, name=args.name, base=moved(args.base, args.additions))
            how = "with the graphs of its base" if added.graphs else "its base was there"
            print(f"{_described(added.clip)}\nadded in {added.seconds:.1f} s, {how}")
        case PullClips():
            from tav_opt.repository.pulling import pull

            pull(args.url, args.repository, lambda one: print(f"{one.name}: {_fetched(one)}", flush=True))
        case RemoveClips():
            for base in clips.remove(args.repository, args.names):
                print(f"base {base}: removed, no clip needs it")
        case VerifyClips():
            problems = clips.verify(args.repository)
            print(*problems or ["all files are as they were written"], sep="\n")
            return 1 if problems else 0
    return 0


def _fetched(one: Pulled) -> str:
    return f"fetched {one.size / 1e6:.1f} MB" if one.size else "is here"


def _described(clip: Clip) -> str:
    info = clip.info
    share = f"{clip.size / 1e6:.1f} MB, base {info.exported_base} {clip.base_size / 1e6:.1f} MB"
    return f"{clip.name}: {info.frames} frames of {info.width}×{info.height}, {share}: {printable(info.prompt)}"
