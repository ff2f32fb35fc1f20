"""`tav-opt tune`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes

from tav_opt import progress
from tav_opt.base.options import BaseOptions
from tav_opt.cli.common import TYPES, Dtype, listed, mention_weights
from tav_opt.config import ClipConfig, InputError, TrainConfig, Within, check_numbers

if TYPE_CHECKING:
    from tav_opt.reference import RunConfig

NO_VIDEO = Path("FILE")
"""Where the videos are those of --many's file."""


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Tune a Stable Diffusion model on one clip and one caption; run again after a stop, it goes on where it was."""

    config: Path | None = None
    """YAML file: one of the reference's. The command line comes before it."""
    many: Path | None = None
    """CSV file of many clips to tune, each into a folder of its own within --out: columns video and prompt, and name,
    start, stride, frames, uniform, height, width, fit where clips have their own (docs/suite.md)."""
    workers: Annotated[int, Within(1, 4096)] | None = None
    """For --many: processes on this machine, or on --ray's cluster (extra `ray`)."""
    ray: str | None = None
    """For --many: address of a Ray cluster, whose nodes all see --out."""
    base: OmitArgPrefixes[BaseOptions]
    prompt: str
    """What the clip shows."""
    out: Path = Path("ckpt")
    """Folder of the checkpoint."""
    clip: OmitArgPrefixes[ClipConfig]
    train: OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU where there is one."""
    dtype: Dtype = "auto"
    """What the networks compute in; what trains has float32 masters. auto: float16 on GPUs, float32 elsewhere."""


def run(arguments: Sequence[str]) -> int:
    """Tune a model on one clip and one caption, or many clips, each on its own."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--many", type=Path)
    given = early.parse_known_args(arguments)[0]
    if given.config and given.many:
        raise InputError("give either --config, of one clip, or --many")
    found, default = _of_yaml(given.config) if given.config else (None, tyro.MISSING_NONPROP)
    if given.many:
        default = _of_many(given.many)
    args = tyro.cli(Tune, prog="tav-opt tune", args=arguments, default=default, registry=TYPES)
    check_numbers(args)
    if args.many:
        return _many(args, args.many)
    if idle := next((name for name in ("workers", "ray") if getattr(args, name) is not None), None):
        raise InputError(f"--{idle} is for --many: one clip is tuned in this process")
    _one(args, found)
    return 0


def _one(args: Tune, found: RunConfig | None) -> None:
    import torch

    from tav_opt import tuning, video
    from tav_opt.device import dtype_on, told, usable_device

    tuning.check(args.train, args.prompt)
    tuning.check_out(args.out)
    mention_weights("tune", (args.prompt, *args.train.preview_prompts))
    device = usable_device(args.device)
    dtype = dtype_on(device, getattr(torch, args.dtype, None))
    clip = video.read(args.clip)
    with progress.shown(first=f"tav-opt tune: on {told(device, dtype)}") as on_progress:
        tuning.tune(
            args.base,
            clip,
            args.prompt,
            args.train,
            args.out,
            device=device,
            dtype=dtype,
            source=args.clip,
            edit=found.edit_defaults if found else None,
            on_step=on_progress,
        )
    print(f"checkpoint: {args.out}")
    if found and found.edit_defaults:
        print(f"edits of it have {listed(found.edit_defaults)} unless told otherwise, as {args.config} says")


def _many(args: Tune, file: Path) -> int:
    if args.prompt or args.clip.video != NO_VIDEO:
        raise InputError(f"--prompt and --video are of one clip: {file} has those of many")
    from tav_opt.suite import evaluating, many

    suite = many.read_clips(file, args.base, args.clip, args.train)
    mention_weights("tune", (*(video.caption or "" for video in suite.videos), *args.train.preview_prompts))
    where = evaluating.Where(device=args.device, dtype=args.dtype, workers=args.workers, ray=args.ray)
    with evaluating.shown() as show:
        outcome, checkpoints = many.tune_all(suite, args.out, where, show)
    for name, fault in outcome.faults.items():
        print(f"tav-opt tune: {name}: {fault}", file=sys.stderr)
    print(*checkpoints, sep="\n", end="\n" * bool(checkpoints))
    return 1 if outcome.faults else 0


def _of_many(path: Path) -> Tune:
    """What the command line need not say, since the file says it; the model it must."""
    return Tune(many=path, base=BaseOptions(model=tyro.MISSING), prompt="", clip=ClipConfig(video=NO_VIDEO))


def _of_yaml(path: Path) -> tuple[RunConfig, Tune]:
    from tav_opt.reference import read_reference_config

    found = read_reference_config(path)
    return found, Tune(
        config=path,
        base=BaseOptions(model=found.model),
        prompt=found.prompt,
        out=found.out,
        clip=found.clip,
        train=found.train,
    )
