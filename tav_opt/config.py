"""What a run of tuning, editing, exporting or serving is told: every default of the package lives here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PAPER = "Wu et al., Tune-A-Video, ICCV 2023, arXiv 2212.11565"


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names the value and what would be right."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which frames of a video are taken, and how they are fitted (defaults: the paper's)."""

    video: Path
    """Video file (MP4, MOV, WebM, MKV, GIF, animated WebP) or a folder of images."""
    start: int = 0
    """First frame."""
    stride: int = 2
    """Take every STRIDE-th frame."""
    frames: int = 24
    """How many frames."""
    uniform: bool = False
    """Spread the frames evenly over the clip instead of start and stride."""
    height: int = 512
    width: int = 512
    fit: Literal["crop", "squash"] = "crop"
    """Centre crop that keeps the aspect, or squash (the reference's way)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one clip is tuned (paper section 4.1 and the reference's configuration)."""

    steps: int = 500
    lr: float = 3e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    """Steps over which the learning rate rises from zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    eps: float = 1e-8
    clip_norm: float = 1.0
    accumulation: int = 1
    """Gradient accumulation: noise draws per optimiser step."""
    trainable: tuple[str, ...] = ("attn1.to_q", "attn2.to_q", "attn_temp")
    """Which parameters train, by the name of their module."""
    gradient_checkpointing: bool = False
    autocast: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 33
    preview_every: int = 0
    """Write an edited preview every so many steps; 0: none."""
    preview_prompts: tuple[str, ...] = ()
    save_every: int = 50
    """Steps between resume states."""
    inversion_steps: int = 50
    """DDIM steps of the inversion that is kept with the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """How an edit is sampled (paper section 4.2)."""

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    """What to stay away from; it takes the place of the empty prompt in guidance."""
    steps: int = 50
    """DDIM steps of sampling."""
    guidance_scale: float = 12.5
    eta: float = 0.0
    """0: deterministic DDIM; 1: as much noise as DDPM."""
    seed: int = 33
    """Of the noise that eta adds, and of the start without inversion."""
    inversion: bool = True
    """Start from the inverted latents of the source; False: from seeded noise."""
    inversion_steps: int | None = None
    """DDIM steps of the inversion; default: those kept with the clip, which cost nothing."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How the served models share the machine; the server writes it into their config.pbtxt, where they read it."""

    instances: int = 1
    """Edits at a time: on each GPU, or on the processor, whose cores they share."""
    queue_size: int = 16
    """Requests that may wait; the next one is told UNAVAILABLE at once."""
    queue_seconds: float = 600.0
    """How long a request may wait unless it names a timeout of its own; 0: for ever."""
    clips_mib: int = 4096
    """Values of clips that stay loaded; the one used longest ago goes first."""
    inversions_mib: int = 256
    """Inversions of videos, kept in memory."""
    responses_mib: int = 256
    """Responses of the unary model, for the same request again."""
    cache: Path | None = None
    """Folder for inversions across restarts; default: tav-opt in the user's cache folder."""
    cache_mib: int = 2048
    """Of that folder; 0: nothing is written."""
    decode_seconds: float = 30.0
    """How long a video of a request may take to decode."""
    log_prompts: bool = False
    """Write the prompts' text into the log."""
