"""`tav-opt tune`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from tyro.conf import OmitArgPrefixes

from tav_opt import progress
from tav_opt.base.options import BaseOptions
from tav_opt.cli.common import TYPES, Dtype, listed, mention_weights
from tav_opt.config import ClipConfig, TrainConfig, check_numbers

if TYPE_CHECKING:
    from tav_opt.reference import RunConfig


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Tune a Stable Diffusion model on one clip and one caption; run again after a stop, it goes on where it was."""

    config: Path | None = None
    """YAML file: one of the reference's. The command line comes before it."""
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


def run(arguments: Sequence[str]) -> None:
    """Tune a model on one clip and one caption."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    path = early.parse_known_args(arguments)[0].config
    found, default = _of_yaml(path) if path else (None, tyro.MISSING_NONPROP)
    args = tyro.cli(Tune, prog="tav-opt tune", args=arguments, default=default, registry=TYPES)
    import torch

    from tav_opt import tuning, video
    from tav_opt.device import dtype_on, told, usable_device

    check_numbers(args)
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
        print(f"edits of it have {listed(found.edit_defaults)} unless told otherwise, as {path} says")


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
