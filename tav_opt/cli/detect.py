"""`tav-opt detect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from tav_opt import video
from tav_opt.config import InputError, check_numbers


@dataclass(frozen=True, kw_only=True)
class Detect:
    """Write the maps that a detector sees in a video, to look at, mend by hand, and give to --control."""

    source: Positional[Path]
    """Video file or folder of images."""
    out: Positional[Path]
    """MP4 or GIF file, or a folder for PNGs."""
    kind: str
    """canny, depth, softedge or pose."""
    detector: str | None = None
    """Where its network is: depth, a directory or hub id; softedge, HED's file; pose, a folder with det.onnx and
    pose.onnx; default: the usual one, of the hub."""


def run(arguments: Sequence[str]) -> None:
    """Write the maps that a detector sees in a video."""
    args = tyro.cli(Detect, prog="tav-opt detect", args=arguments)
    check_numbers(args)
    from tav_opt.conditions.detectors import detecting

    detecting.check_kind(args.kind)
    video.check_out(args.out)
    if not args.source.exists():
        raise InputError(f"{args.source} does not exist")
    clip = video.read(args.source)
    video.write(args.out, detecting.detect(args.kind, clip.frames, args.detector), clip.fps)
    print(args.out)
