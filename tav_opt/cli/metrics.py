"""`tav-opt metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from tav_opt import video
from tav_opt.command import printable
from tav_opt.config import MetricsConfig, check_numbers
from tav_opt.files import check_place, write_json

if TYPE_CHECKING:
    from tav_opt.metrics.measuring import Measured


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Measure an edit by the paper's metrics and those of later benchmarks (docs/metrics.md)."""

    edit: Positional[Path]
    """Video file or folder of images; the encoder's embeddings of it are kept beside it."""
    source: Path
    """What was edited: as many frames of the same size."""
    prompt: str
    """What the edit shall show."""
    source_prompt: str | None = None
    """What the source shows; for frame accuracy."""
    mask: Path | None = None
    """Image, video or folder of images, black where the picture shall stay; for the background's metrics."""
    networks: OmitArgPrefixes[MetricsConfig] = field(default_factory=MetricsConfig)
    json: Path | None = None
    """File for the figures."""


def run(arguments: Sequence[str]) -> None:
    """Measure an edit against its source and its prompt."""
    args = tyro.cli(Metrics, prog="tav-opt metrics", args=arguments)
    check_numbers(args)
    if args.json is not None:
        check_place(args.json)
    frames, source = video.read(args.edit).frames, video.read(args.source).frames
    from tav_opt.metrics.edited import Edited
    from tav_opt.video.masks import read_mask

    mask = None if args.mask is None else read_mask(args.mask)
    edited = Edited(
        frames=frames, source=source, prompt=args.prompt, source_prompt=args.source_prompt, mask=mask
    )  # what does not fit is said before any network is loaded
    from tav_opt.metrics.measuring import Networks, measure

    measured = measure(edited, Networks.open(args.networks), args.edit)
    print(_table(measured))
    if args.json is not None:
        given = {"edit": args.edit, "source": args.source, "mask": args.mask}
        prompts = {"prompt": args.prompt, "source_prompt": args.source_prompt}
        write_json(args.json, given | prompts | measured.to_json())
        print(args.json)


def _table(measured: Measured) -> str:
    """The networks, the figures, and what is left out."""
    rows = {
        **measured.networks,
        **{name: f"{value:.4g}" for name, value in measured.values.items()},
        **{name: f"left out: {reason}" for name, reason in measured.left_out.items()},
    }
    width = max(map(len, rows)) + 2
    return "\n".join(f"{name:{width}}{printable(text)}" for name, text in rows.items())
