"""What a run of tuning, editing, exporting or serving is told: every default of the package lives here."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from tav_opt.config_base import Config, InputError, Within, documented, texts

# Whoever has settings takes these from here too.
from tav_opt.config_base import check_numbers as check_numbers
from tav_opt.config_base import check_text as check_text
from tav_opt.config_base import described as described
from tav_opt.config_base import first_line as first_line
from tav_opt.config_base import literal_weights as literal_weights
from tav_opt.config_base import ranges as ranges
from tav_opt.config_base import with_absolute_paths as with_absolute_paths

PathLike = str | os.PathLike[str]
"""What every public function takes for a path."""

OnProgress = Callable[[str, int, int], object]
"""Called with the stage, its steps done, and its steps; what it raises ends the work."""

PAPER = "Wu et al., Tune-A-Video, ICCV 2023, arXiv 2212.11565"

EngineName = Literal["tensorrt", "compiled", "onnxruntime", "pytorch"]
EngineChoice = Literal["auto", "tensorrt", "compiled", "onnxruntime", "pytorch"]
SolverName = Literal["ddim", "dpm++", "unipc"]
Preset = Literal["exact", "fast", "draft"]
Keep = Literal["background", "motion"]

Count = Annotated[int, Within(1, 10**6)]
Index = Annotated[int, Within(0, 10**6)]
Side = Annotated[int, Within(1, 2**14)]
Seed = Annotated[int, Within(0, 2**63 - 1)]
DdimSteps = Annotated[int, Within(1, 1000)]
Iterations = Annotated[int, Within(0, 100)]
GuidanceScale = Annotated[float, Within(0, 100)]
LearningRate = Annotated[float, Within(0, 1)]
Fps = Annotated[float, Within(0.001, 1000)]
Share = Annotated[float, Within(0, 1)]
Mib = Annotated[int, Within(0, 2**30)]


@documented
@dataclass(frozen=True, kw_only=True)
class Additions(Config):
    """What is put into a base model before it is inflated; all of it belongs to what a clip is tuned on."""

    model_config: str | None = None
    """Of a single file: Stable Diffusion directory, or hub id, that has its configurations and tokenizer."""
    loras: tuple[str, ...] = ()
    """FILE[:weight] of LoRAs, weight 1 unless given; or the folder that PEFT or diffusers saved."""
    embeddings: tuple[str, ...] = ()
    """FILE[:token] of textual inversions; the token is the file's own unless given."""
    vae: str | None = None
    """Directory or hub id of another VAE."""

    def given(self) -> dict[str, Any]:
        """Those that there are, by name, as JSON has them."""
        found = {field.name: getattr(self, field.name) for field in fields(Additions)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items() if value}


@documented
@dataclass(frozen=True, kw_only=True)
class BaseConfig(Additions):
    """A Stable Diffusion, and what its owner adds to it."""

    model: str
    """Stable Diffusion directory, hub id, or single file (.safetensors, .ckpt)."""

    def given(self) -> dict[str, Any]:
        return {"model": self.model, **super().given()}


Fit = Literal["crop", "squash"]
"""How frames of another shape come to a clip's size."""


@documented
@dataclass(frozen=True, kw_only=True)
class ClipConfig(Config):
    """Which frames of a video are taken, and how they are fitted (defaults: the paper's)."""

    video: Path
    """Video file (MP4, MOV, WebM, MKV, GIF, animated WebP) or a folder of images."""
    start: Index = 0
    """First frame."""
    stride: Count = 2
    """Take every STRIDE-th frame."""
    frames: Count = 24
    """How many frames."""
    uniform: bool = False
    """Spread the frames evenly over the clip instead of start and stride."""
    height: Side = 512
    """Of the frames, in pixels; a multiple of the VAE's factor, 8 for Stable Diffusion. So is the width."""
    width: Side = 512
    """Of the frames."""
    fit: Fit = "crop"
    """Centre crop that keeps the aspect, or squash (the reference's way)."""


@documented
@dataclass(frozen=True, kw_only=True)
class InversionConfig(Config):
    """How a source is inverted: all that the latents depend on beside the source, the clip and its base."""

    steps: DdimSteps = 50
    """DDIM steps."""
    iterations: Iterations = 0
    """How often each step is refined; 0: the reference's step."""
    trajectory: bool = False
    """Keep the latents that each step led to, for direct inversion, and not the last alone."""

    @property
    def key(self) -> str:
        """The same for inversions that lead to the same latents, and only for them."""
        refined = f"{self.steps}+{self.iterations}" if self.iterations else f"{self.steps}"
        return f"{refined} trajectory" if self.trajectory else refined


@documented
@dataclass(frozen=True, kw_only=True)
class OptimiserConfig(Config):
    """How whatever trains is trained, and what is written on the way."""

    steps: Count = 500
    """Optimiser steps."""
    lr: LearningRate = 3e-5
    """AdamW's learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up."""
    warmup: Index = 0
    """Steps over which the learning rate rises from zero."""
    betas: Annotated[tuple[float, float], Within(0, 1, below=True)] = (0.9, 0.999)
    """AdamW's."""
    weight_decay: Annotated[float, Within(0, 1)] = 1e-2
    """AdamW's."""
    eps: Annotated[float, Within(0, 1)] = 1e-8
    """AdamW's."""
    clip_norm: Annotated[float, Within(0, math.inf)] = 1.0
    """Largest norm of all gradients together; inf: as large as it is."""
    accumulation: Annotated[int, Within(1, 10**4)] = 1
    """Gradient accumulation: noise draws per optimiser step."""
    gradient_checkpointing: bool | None = None
    """Compute activations twice, not keep them: less memory, more time; default: only where memory asks for it."""
    autocast: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision: UNet, and text encoder where that may train, compute in it; no: in the dtype of the others.
    What trains has float32 masters."""
    seed: Seed = 33
    """Of the noise, the timesteps, and what starts at random."""
    preview_every: Index = 0
    """Write a preview every so many steps; 0: none."""
    preview_prompts: tuple[str, ...] = ()
    """What the previews show."""
    save_every: Count = 50
    """Steps between resume states."""
    keep_state: bool = False
    """Keep the last resume state: the same command with more steps then goes on from the finished run."""


@documented
@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimiserConfig):
    """How one clip is tuned (paper section 4.1 and the reference's configuration)."""

    trainable: tuple[str, ...] = ("attn1.to_q", "attn2.to_q", "attn_temp")
    """Which parameters train, by the name of their module."""
    inversion_steps: DdimSteps = InversionConfig.steps
    """DDIM steps of the inversion that is kept with the checkpoint."""
    inversion_iterations: Iterations = InversionConfig.iterations
    """How often each of these steps is refined; 0: the reference's step."""
    window: Annotated[int, Within(2, 10_000)] | None = None
    """Frames that the network takes at once; of a longer clip each step draws such a window, and edits go over windows
    that overlap. Default: all frames of the clip."""

    @property
    def inversion(self) -> InversionConfig:
        """Of the clip, once it is tuned."""
        return InversionConfig(steps=self.inversion_steps, iterations=self.inversion_iterations)


@documented
@dataclass(frozen=True, kw_only=True)
class PersonaliseConfig(OptimiserConfig):
    """How a model learns a subject from a few pictures (DreamBooth, Ruiz et al. 2022, arXiv 2208.12242)."""

    lr: LearningRate = 5e-6
    """AdamW's learning rate; some twenty times as much for a LoRA."""
    gradient_checkpointing: bool | None = None
    """Compute activations twice, not keep them: less memory, more time; auto, the default, is off here."""
    batch: Annotated[int, Within(1, 64)] = 1
    """Pictures a step, and as many of the class."""
    class_images: Annotated[int, Within(1, 10_000)] = 100
    """Pictures of the class, which the model draws itself before it learns."""
    prior_weight: Annotated[float, Within(0, 100)] = 1.0
    """Of the class's pictures in the loss."""
    text_encoder: bool = False
    """Train the text encoder too."""
    lora_rank: Annotated[int, Within(0, 1024)] = 0
    """Train a LoRA of this rank in place of all weights; 0: all weights."""
    draw_steps: DdimSteps = 25
    """DDIM steps of the class's pictures and the previews."""
    draw_guidance: GuidanceScale = 7.5
    """Classifier-free guidance scale of the class's pictures and the previews."""


@documented
@dataclass(frozen=True, kw_only=True)
class Control(Config):
    """How far an edit follows maps, by a ControlNet or a T2I-Adapter of this name."""

    name: str
    """As `pose`: the network's and the maps' own."""
    scale: Annotated[float, Within(0, 10)] = 1.0
    """What is added inside the UNet is multiplied by it."""
    start: Annotated[float, Within(0, 1)] = 0.0
    """Share of the steps after which it begins."""
    end: Annotated[float, Within(0, 1)] = 1.0
    """Share of the steps after which it has ended."""


EDIT_DEFAULTS = ("steps", "guidance_scale", "inversion")
"""The settings of an edit that a clip may bring with it; a request that leaves them out gets the clip's."""
PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "exact": {},
    "fast": {"steps": 20, "guidance_interval": 2},
    "draft": {"steps": 12, "guidance_interval": 3},
}
"""What cheaper edits are made with, in place of the clip's own settings and the defaults; docs/presets.md has what each
costs and loses."""
KEEP: Mapping[Keep, Mapping[str, Any]] = {
    "background": {"replace_cross": 0.5, "replace_self": 0.5, "direct_inversion": True},
    "motion": {"replace_cross": 0.8, "replace_self": 0.8, "direct_inversion": True},
}
"""Attention control for people who need not know of it, where its settings are not given; docs/attention-control.md has
what each keeps and loses."""
CONTROL_SETTINGS = (
    "keep", "source_prompt", "replace_cross", "replace_self", "blend_words", "word_weights", "direct_inversion",
)  # fmt: skip
"""The settings of attention control."""
FILLED_IN = (*EDIT_DEFAULTS, "solver", "guidance_interval", "reuse_interval")
"""The settings of an edit that a clip or a preset fills in where they are not given."""


@documented
@dataclass(frozen=True, kw_only=True)
class EditConfig(Config):
    """How an edit is sampled (paper section 4.2)."""

    prompts: tuple[str, ...] = ()
    """What to draw: one edit of each; a text alone is one prompt."""
    negative_prompt: str = ""
    """What to stay away from; it takes the place of the empty prompt in guidance."""
    steps: DdimSteps = 50
    """DDIM steps of sampling."""
    guidance_scale: GuidanceScale = 12.5
    """Classifier-free guidance scale."""
    solver: SolverName = "ddim"
    """How a step is made of what the network predicts: ddim as in the paper, DPM-Solver++(2M) or UniPC."""
    guidance_interval: Annotated[int, Within(1, 1000)] = 1
    """After the first fifth of the steps, guidance is computed in every so manieth step, and kept in between."""
    reuse_interval: Annotated[int, Within(1, 1000)] = 1
    """After the first fifth of the steps, the whole network runs in every so manieth step, and in between its outermost
    layers alone, on what came to them from below."""
    eta: Annotated[float, Within(0, 1)] = 0.0
    """0: deterministic DDIM; 1: as much noise as DDPM."""
    seed: Seed = 33
    """Of the noise that eta adds, and of the start without inversion."""
    inversion: bool = True
    """Start from the inverted latents of the source; False: from seeded noise."""
    inversion_steps: DdimSteps | None = None
    """DDIM steps of the inversion; default: those kept with the clip, which cost nothing."""
    inversion_iterations: Iterations | None = None
    """How often each step of the inversion is refined; default: as in the one kept with the clip."""
    keep: Keep | None = None
    """What of the source is kept: background, all but what the prompt changes, or motion; fills in the next six."""
    source_prompt: str | None = None
    """What the source shows; default: the clip's caption."""
    replace_cross: Share | None = None
    """Share of the steps in which attention to text takes the source's probabilities, word by word; default: 0."""
    replace_self: Share | None = None
    """Share of the steps in which attention to frames takes the source's queries and keys; default: 0."""
    blend_words: tuple[str, ...] = ()
    """Words, of the source's prompt and of what to draw, outside of which the source stays as it is; `dog#2` is the
    second dog."""
    word_weights: tuple[str, ...] = ()
    """WORD:WEIGHT of words to draw, what their part in attention is multiplied by."""
    direct_inversion: bool | None = None
    """Put the source back on its inverted trajectory at every step while the edit looks at it; default: off."""

    controls: tuple[Control, ...] = ()
    """What the edit follows beside its prompt; each has a network, and maps of every frame."""
    control_inversion: bool = False
    """The source is inverted with the conditions, too; False: without, as it was tuned."""

    def filled(self) -> Self:
        """Attention control as it is carried out: what was not given is as `keep` has it, or else off."""
        found: dict[str, Any] = {"replace_cross": 0.0, "replace_self": 0.0, "direct_inversion": False}
        found |= KEEP.get(self.keep, {}) if self.keep else {}
        return replace(self, **{name: value for name, value in found.items() if getattr(self, name) is None})

    @property
    def blends(self) -> bool:
        """Whether there are places where the source stays as it is."""
        return bool(self.blend_words) or self.keep == "background"

    @property
    def controlled(self) -> bool:
        """Whether attention is; if not, the edit is the paper's."""
        return self.beside or bool(self.word_weights)

    @property
    def beside(self) -> bool:
        """Whether the edit takes something from its source, which is then sampled beside it."""
        filled = self.filled()
        return self.blends or bool(filled.replace_cross or filled.replace_self)

    @classmethod
    def of_preset(cls, name: Preset, **settings: Any) -> Self:
        """The settings of a preset, and those that are given, which go before its own; the rest are the defaults."""
        return cls(**{**PRESETS[name], **settings})

    @classmethod
    def of(cls, edit: EditConfig | str | Iterable[str]) -> EditConfig:
        """Prompts alone stand for settings with these prompts."""
        return edit if isinstance(edit, EditConfig) else cls(prompts=texts("prompts", edit))


def check_preset(name: str, given: Collection[str]) -> None:
    """Raises InputError for an unknown preset, and for one that would be ignored: all of its settings are given."""
    found = PRESETS.get(cast(Preset, name))
    if found is None:
        raise InputError(f"preset {name[:63]!r} is not {', '.join(PRESETS)}")
    if found and set(found) <= set(given):
        settings = ", ".join(found).replace("_", " ")
        raise InputError(
            f"preset {name} would change nothing: {settings} are given (EditConfig.of_preset fills in the rest)"
        )


CLIP = "openai/clip-vit-large-patch14"
"""What the paper's metrics are measured with, as TGVE 2023 does (arXiv 2310.16003)."""


@documented
@dataclass(frozen=True, kw_only=True)
class MetricsConfig(Config):
    """The networks that an edit is measured with: directories or hub ids of transformers' networks."""

    clip: str | None = None
    """Of frame consistency, textual alignment and frame accuracy; default: openai/clip-vit-large-patch14, or the
    demo's own encoder where that is not to be had."""
    pick_score: str | None = None
    """PickScore's own CLIP, yuvalkirstain/PickScore_v1; without it there is no PickScore."""
    dino: str | None = None
    """DINO's ViT, facebook/dino-vitb8; without it there is no structure distance."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto: a GPU where there is one."""
    batch: Count = 16
    """Frames that go through a network at a time."""


@documented
@dataclass(frozen=True, kw_only=True)
class WorkerConfig(Config):
    """How the served models share the machine; the server writes it into their config.pbtxt, where they read it."""

    engine: EngineChoice = "auto"
    """What runs the exported clips; auto: the best that can, which is said at the start."""
    instances: Annotated[int, Within(1, 64)] = 1
    """Processes that edit: on each GPU, or on the processor, whose cores they share."""
    batch_requests: Annotated[int, Within(1, 64)] = 1
    """Streamed edits that an instance has in hand at a time; those of one clip share every call of the network."""
    queue_size: Annotated[int, Within(1, 100_000)] = 16
    """Requests that may wait; the next one is told UNAVAILABLE at once."""
    queue_seconds: Annotated[float, Within(0, 86_400)] = 600.0
    """How long a request may wait unless it names a timeout of its own; 0: for ever."""
    clips_mib: Mib = 4096
    """Values of clips that stay loaded; the one used longest ago goes first."""
    inversions_mib: Mib = 256
    """Inversions of videos, kept in memory."""
    responses_mib: Mib = 256
    """Responses of the unary model, for the same request again."""
    cache: Path | None = None
    """Folder for inversions across restarts; default: tav-opt in the user's cache folder."""
    cache_mib: Mib = 2048
    """Of that folder; 0: nothing is written."""
    decode_seconds: Annotated[float, Within(0.1, 3600)] = 30.0
    """How long a video of a request may take to decode."""
    longest_source: Count = 1024
    """Frames that a source in a clip's place may have."""
    windows_at_once: Annotated[int, Within(1, 1024)] = 1
    """Windows of a long clip in one call of the network; more take as many times its memory."""
    response_mib: Annotated[int, Within(1, 1024)] = 256
    """Frames in one response; those of a larger result come in several, as they are decoded."""
    log_prompts: bool = False
    """Write the prompts' text into the log."""
