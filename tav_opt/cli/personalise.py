"""`tav-opt personalise`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes, UseAppendAction

from tav_opt import progress
from tav_opt.base.options import BaseOptions
from tav_opt.cli.common import TYPES, Dtype, mention_weights
from tav_opt.config import PersonaliseConfig, check_numbers


@dataclass(frozen=True, kw_only=True)
class Personalise:
    """Teach a Stable Diffusion a subject from 3 to 5 pictures (DreamBooth); run again after a stop, it goes on."""

    base: OmitArgPrefixes[BaseOptions]
    images: Path
    """Folder of the pictures; each is cropped to the model's square."""
    prompt: str
    """What the pictures show, with a word of its own: "a photo of sks creature"."""
    class_prompt: UseAppendAction[tuple[str, ...]] = ()
    """The same without that word: the model draws such pictures first, and learns to go on drawing them. Given again,
    as in another place, they are drawn in turn."""
    out: Path = Path("personal")
    """Folder for the diffusers directory, or the LoRA: what --model or --lora of tune takes."""
    train: OmitArgPrefixes[PersonaliseConfig] = field(default_factory=PersonaliseConfig)
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU where there is one."""
    dtype: Dtype = "auto"
    """What the networks compute in; what trains has float32 masters. auto: float16 on GPUs, float32 elsewhere."""


def run(arguments: Sequence[str]) -> None:
    """Teach a model a subject from a few pictures."""
    args = tyro.cli(Personalise, prog="tav-opt personalise", args=arguments, registry=TYPES)
    import torch

    from tav_opt.device import dtype_on, told, usable_device
    from tav_opt.personalise import dreambooth

    check_numbers(args)
    dreambooth.check(args.train, args.prompt, args.class_prompt)
    dreambooth.check_out(args.out)
    mention_weights("personalise", (args.prompt, *args.class_prompt, *args.train.preview_prompts))
    device = usable_device(args.device)
    dtype = dtype_on(device, getattr(torch, args.dtype, None))
    with progress.shown(first=f"tav-opt personalise: on {told(device, dtype)}") as on_progress:
        dreambooth.personalise(
            args.base,
            args.images,
            args.prompt,
            args.train,
            args.out,
            class_prompt=args.class_prompt,
            device=device,
            dtype=dtype,
            on_step=on_progress,
        )
    print(f"{'LoRA' if args.train.lora_rank else 'model'}: {args.out}")
