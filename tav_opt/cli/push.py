"""`tav-opt push`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional, UseAppendAction


@dataclass(frozen=True, kw_only=True)
class Push:
    """Share a tuned clip on the Hugging Face hub, with a model card; no folder of this machine is named there."""

    checkpoint: Positional[Path]
    """Folder that `tav-opt tune` wrote."""
    hub_id: Positional[str]
    """Where it goes: owner/name."""
    base: str | None = None
    """Hub id of the base model, where the clip was tuned on a folder."""
    license: str | None = None
    """As the hub knows it, e.g. creativeml-openrail-m; what the base's licence asks for holds as well."""
    picture: UseAppendAction[tuple[Path, ...]] = ()
    """PNG, JPEG, GIF, WebP or MP4 to show on the card; give it once per file. The run's own are there already."""
    private: bool = False
    """A new repository is for its owner alone."""


def run(arguments: Sequence[str]) -> None:
    """Share a tuned clip on the Hugging Face hub, with a model card."""
    args = tyro.cli(Push, prog="tav-opt push", args=arguments)
    from tav_opt import sharing

    card = sharing.CardConfig(base=args.base, license=args.license, pictures=args.picture)
    print(sharing.push(args.checkpoint, args.hub_id, card, private=args.private))
