"""`tav-opt edit`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, Suppress

from tav_opt import progress
from tav_opt.base.options import AddedOptions, moved
from tav_opt.cli import controls
from tav_opt.cli.common import (
    Dtype,
    Guidance,
    Prompts,
    check_edit,
    given_settings,
    listed,
    mention_idle_seed,
    mention_weights,
    write,
)
from tav_opt.cli.controls import ControlOptions
from tav_opt.conditions.network_options import NetworkOptions, named
from tav_opt.config import PRESETS, Control, EditConfig, EngineChoice, Fps, InputError, Preset, Within, check_preset

if TYPE_CHECKING:
    import numpy as np

    from tav_opt.clip_folder import ClipFolder
    from tav_opt.contract import ClipInfo
    from tav_opt.engines import Engine
    from tav_opt.video.restoring import Shape


@dataclass(frozen=True, kw_only=True)
class Edit(EditConfig):
    """Edit a tuned or exported clip by a prompt, in this process."""

    checkpoint: Positional[Path]
    """Folder that `tav-opt tune` wrote, that of an exported clip (`…/tune_a_video_stream/1/clips/NAME`), or the hub id
    of a clip."""
    engine: EngineChoice = "auto"
    """What runs an exported clip; a checkpoint runs in eager PyTorch."""
    preset: Preset = "exact"
    """Cheaper settings in place of the clip's and the defaults, where others are not given here."""
    controls: Suppress[tuple[Control, ...]] = ()
    following: OmitArgPrefixes[ControlOptions] = field(default_factory=ControlOptions)
    networks: OmitArgPrefixes[NetworkOptions] = field(default_factory=NetworkOptions)
    prompts: Prompts = ()
    guidance_scale: Guidance = EditConfig.guidance_scale
    mask: Path | None = None
    """White where the picture may change; the rest stays. An image, or a video or folder of images, whose frames are
    chosen and fitted as the clip's were."""
    windows_at_once: Annotated[int, Within(1, 1024)] = 1
    """Windows of a clip longer than its network takes in one call; more take as many times the memory."""
    out: Path = Path("edit.mp4")
    """MP4 or GIF file, or a folder for PNGs; several prompts are numbered."""
    size: Literal["clip", "source"] = "clip"
    """That of the clip's frames, or that at which its source is shown, with black where it was cropped."""
    fps: Fps | None = None
    """Frames a second; default: those at which the clip moves as its source did, with its sound. Others go without."""
    side_by_side: bool = False
    """Write one video that shows the source beside all edits, with captions."""
    prompt_metadata: bool = False
    """Write the prompts into the files, beside the other settings."""
    base: str | None = None
    """The base model, where it has moved; so are the next four what was added to it."""
    additions: OmitArgPrefixes[AddedOptions] = field(default_factory=AddedOptions)
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU where there is one."""
    dtype: Dtype = "auto"
    """Of a checkpoint's networks; auto: float16 on GPUs, float32 elsewhere."""


def run(arguments: Sequence[str]) -> None:
    """Edit a tuned or exported clip by prompts, in this process."""
    args, given = given_settings(Edit, "tav-opt edit", arguments)
    from tav_opt.clip_folder import ClipFolder

    check_preset(args.preset, given)
    clip = ClipFolder.at(args.checkpoint)
    check_edit(args, args.out, 1 if args.side_by_side else len(args.prompts))
    if args.mask is not None and not args.mask.exists():
        raise InputError(f"mask {args.mask} does not exist")
    args = replace(args, controls=controls.asked(args.following))
    from tav_opt import editing
    from tav_opt.contract import edit_metadata, same_speed
    from tav_opt.device import told, usable_device
    from tav_opt.video import contact_sheet
    from tav_opt.video.restoring import restored

    usable_device(args.device)  # before anything is read
    args = clip.info.edited(args, given, args.preset)
    editing.check(args)
    mention_weights("edit", (*args.prompts, args.negative_prompt))
    engine = _opened(args, clip)
    shape = _shape(engine.info) if args.size == "source" else None
    latents = engine.source_latents
    place = latents.device if clip.exported else told(latents.device, latents.dtype)
    for who, found in (("clip", engine.info.edit), (f"preset {args.preset}", PRESETS[args.preset])):
        if own := {name: value for name, value in found.items() if name not in given and getattr(args, name) == value}:
            print(f"tav-opt edit: {listed(own)}, as the {who} brings it", file=sys.stderr)
    if "seed" in given:
        mention_idle_seed("edit", args.seed, inversion=args.inversion, eta=args.eta)
    maps = _maps(args, engine)
    with progress.shown(first=f"tav-opt edit: {engine.kind} on {place}") as on_progress:
        at_once = args.windows_at_once
        edited = editing.edit(engine, args, mask=args.mask, maps=maps, windows_at_once=at_once, on_progress=on_progress)
        edits = list(edited)
    captions = [[prompt] for prompt in args.prompts]
    source = engine.decode(engine.source_latents)[0] if args.side_by_side else None
    if shape is not None:
        edits = [restored(frames, shape) for frames in edits]
        source = None if source is None else restored(source, shape)
    if source is not None:
        edits = [contact_sheet.side_by_side([source, *edits], [engine.info.prompt, *args.prompts])]
        captions = [list(args.prompts)]
    about = partial(
        edit_metadata,
        engine.info,
        clip.name,
        args,
        engine=engine.kind,
        masked=args.mask is not None,
        with_prompts=args.prompt_metadata,
    )
    fps = args.fps or engine.info.fps
    sound = engine.sound if same_speed(args.fps, engine.info.fps) else None
    write(args.out, edits, fps, [about(prompts) for prompts in captions], sound)


def _shape(info: ClipInfo) -> Shape:
    """Of the clip's source; raises InputError where nobody kept it."""
    from tav_opt.video.restoring import Shape

    if info.source_height is None or info.source_width is None:
        raise InputError("size source: the clip does not tell its source's size; tune it again, or leave it out")
    return Shape(height=info.source_height, width=info.source_width, fit=info.fit)


def _opened(args: Edit, clip: ClipFolder) -> Engine:
    """The clip with the networks that the edit's maps are for."""
    import torch

    from tav_opt.conditions import condition
    from tav_opt.engines.registry import load

    nets = {name: named(name, getattr(args.networks, name), "PLACE") for name in ("controlnet", "adapter")}
    names = [one.name for one in args.controls]
    if idle := sorted({*nets["controlnet"], *nets["adapter"]} - {*names}):
        raise InputError(f"{idle[0]!r} is a network that follows nothing: give --control {idle[0]}=FILE")
    engine = load(
        clip,
        engine=args.engine,
        device=args.device,
        dtype=getattr(torch, args.dtype, None),
        base=moved(args.base, args.additions),
        controlnets=nets["controlnet"],
        adapters=nets["adapter"],
    )
    if names:
        condition.check(args.controls, names, engine.networks)
    return engine


def _maps(args: Edit, engine: Engine) -> dict[str, np.ndarray]:
    info = engine.info
    size = info.frames, info.height, info.width
    return controls.maps(args.following, *size, lambda: engine.decode(engine.source_latents)[0], info.fit)
