"""`tav-opt request`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Suppress

from tav_opt import progress
from tav_opt.cli import controls
from tav_opt.cli.common import Guidance, Prompts, check_edit, given_settings, mention_idle_seed, mention_weights, write
from tav_opt.cli.controls import ControlOptions
from tav_opt.config import (
    FILLED_IN,
    ClipConfig,
    Control,
    Count,
    EditConfig,
    Fit,
    Fps,
    Index,
    InputError,
    Preset,
    Within,
)

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Request(EditConfig):
    """Edit an exported clip on a running server, over gRPC."""

    clip: str
    """Name of the exported clip."""
    video: Path | None = None
    """Video file, or folder of images, to edit in the clip's place; the next five fit it to the clip, as in tune."""
    frames: Count | None = None
    """How many frames of it; default: as many as the clip has."""
    start: Index = ClipConfig.start
    """First frame."""
    stride: Count = ClipConfig.stride
    """Take every STRIDE-th frame."""
    uniform: bool = ClipConfig.uniform
    """Spread the frames evenly over the video instead of start and stride."""
    fit: Fit = ClipConfig.fit
    """Centre crop that keeps the aspect, or squash."""
    mask: Path | None = None
    """White where the picture may change; the rest stays. An image, or a video or folder of images, fitted like the
    video."""
    preset: Preset = "exact"
    """Cheaper settings in place of the clip's and the defaults, where others are not given here."""
    url: str = "localhost:8001"
    """Server's gRPC address."""
    deadline: Annotated[float, Within(0.001, 30 * 86_400)] | None = None
    """Seconds after which the edit is given up."""
    attempts: Annotated[int, Within(1, 1000)] = 6
    """How often a request is sent that a server too busy, or not there, never began."""
    tls: bool = False
    """Encrypt the connection; so does each of the next three."""
    root_certificates: Path | None = None
    """PEM file of the authorities to trust."""
    certificate: Path | None = None
    """PEM file of the client's own certificate, and its key."""
    key: Path | None = None
    controls: Suppress[tuple[Control, ...]] = ()
    following: OmitArgPrefixes[ControlOptions] = field(default_factory=ControlOptions)
    prompts: Prompts = ()
    guidance_scale: Guidance = EditConfig.guidance_scale
    out: Path = Path("edit.mp4")
    """MP4 file, which the server encodes, GIF file, or a folder for PNGs; several prompts are numbered."""
    size: Literal["clip", "source"] = "clip"
    """That of the clip's frames, or that at which --video is shown, with black where it was cropped; encoded here."""
    fps: Fps | None = None
    """Frames a second; default: those at which the clip, or the video, moves as it did, with its sound. Others go
    without."""
    prompt_metadata: bool = False
    """Write the prompts into the files, beside the other settings."""


def run(arguments: Sequence[str]) -> int:
    """Edit an exported clip on a running server, over gRPC."""
    args, given = given_settings(Request, "tav-opt request", arguments)
    from tav_opt.client import Client, Retry, ServerError, Tls
    from tav_opt.client.sources import FITTING
    from tav_opt.contract import Output

    check_edit(args, args.out, len(args.prompts))
    args = replace(args, controls=controls.asked(args.following))
    mention_weights("request", (*args.prompts, args.negative_prompt))
    fitting = tuple(name for name in FITTING if getattr(args, name) != getattr(Request, name))
    names = ("video", *FITTING) if args.video is not None else fitting
    source: Any = {name: found for name in (*names, "mask") if (found := getattr(args, name)) is not None}
    if args.size == "source" and args.video is None:
        raise InputError("size source: only of a --video; the clip's own is for tav-opt edit")
    encoded = args.out.suffix.lower() == ".mp4" and args.size == "clip"
    output: Output = "mp4" if encoded else "frames"
    files = {name: getattr(args, name) for name in ("root_certificates", "certificate", "key")}
    tls = Tls(**files) if args.tls or any(files.values()) else None
    retry = Retry(
        attempts=args.attempts,
        on_pause=lambda why, pause: print(f"tav-opt request: {why}; again in {pause:.1f} s", file=sys.stderr),
    )
    try:
        with Client(args.url, tls=tls, retry=retry) as client, progress.shown() as on_progress:
            if args.controls:
                clip = client.clip(args.clip)
                size = args.frames or clip.frames, clip.height, clip.width
                source["maps"] = controls.maps(args.following, *size, _no_source, args.fit)
            result = client.edit(
                args.clip,
                args,
                on_progress=on_progress,
                deadline_s=args.deadline,
                output=output,
                prompt_metadata=args.prompt_metadata,
                fps=args.fps,
                preset=args.preset,
                left_out=set(FILLED_IN) - given,
                **source,
            )
    except ServerError as error:
        print(f"tav-opt request: {error}", file=sys.stderr)
        return 1
    if "seed" in given and result.metadata:
        used = result.metadata[0]  # whether to invert may be the clip's to say
        mention_idle_seed("request", args.seed, inversion=used["inversion"], eta=used["eta"])
    edits = result.videos or list(result.frames)
    if args.video is not None and args.size == "source":
        from tav_opt.video import read
        from tav_opt.video.restoring import restored

        shape = read(args.video, count=1).shape
        assert shape is not None
        edits = [restored(frames, replace(shape, fit=args.fit)) for frames in result.frames]
    write(args.out, edits, result.fps, result.metadata, result.sound)
    return 0


def _no_source() -> np.ndarray:
    raise InputError(
        f"--control …={controls.SOURCE}: the clip is the server's, not here: give the video's file and --detect"
    )
