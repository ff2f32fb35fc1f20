"""One-shot tuning of the inflated UNet on one clip and one caption (paper section 3.2 and 4.1)."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from tav_opt import checkpoint, ddim, memory, models, resume, sheet
from tav_opt.checkpoint import Checkpoint
from tav_opt.config import ClipConfig, EditConfig, InputError, TrainConfig
from tav_opt.contract import ClipInfo
from tav_opt.ddim import Schedule
from tav_opt.files import whole
from tav_opt.models import StableDiffusion
from tav_opt.unet import VideoUNet, clip_value_names, trained_names
from tav_opt.video import Clip

Draw = Callable[[int, int], tuple[Tensor, Tensor]]
"""`draw(step, micro_step) -> noise (b,c,f,h,w), timesteps (b,)`: always the same for the same numbers."""

Stage = Literal["tune", "invert"]
OnStep = Callable[[Stage, int, int, float], object]
"""Called with the stage, the steps done, the steps of the stage, and the last loss."""

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Training:
    """All that the next step depends on; `resume` keeps it on disk."""

    trained: dict[str, nn.Parameter]
    """fp32 masters by name: the UNet's own parameters."""
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    losses: list[float]

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)


def begin(unet: VideoUNet, config: TrainConfig) -> Training:
    """Makes the UNet trainable in place: the chosen parameters in float32, the others frozen as they are."""
    unet.requires_grad_(False)
    own = dict(unet.named_parameters())
    trained = {name: own[name] for name in trained_names(unet, config.trainable)}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, eps=config.eps, fused=True
    )
    scaler = torch.amp.GradScaler(unet.device.type, enabled=_half(unet, config) == torch.float16)
    return Training(trained, optimizer, scaler, [])


def train_step(
    training: Training,
    unet: VideoUNet,
    latents: Tensor,
    text: Tensor,
    schedule: Schedule,
    config: TrainConfig,
    draw: Draw,
) -> float:
    """One optimiser step over `config.accumulation` draws of noise → their mean loss, also added to `training.losses`.

    latents (b,c,f,h,w), text (b,tokens,width). Raises InputError when the loss is no number.
    """
    for group in training.optimizer.param_groups:
        group["lr"] = config.lr * lr_factor(config, training.step)
    total = 0.0
    for micro in range(config.accumulation):
        noise, timesteps = draw(training.step, micro)
        with _autocast(unet, _half(unet, config)):
            loss = denoising_loss(unet, latents, text, schedule, noise, timesteps) / config.accumulation
        training.scaler.scale(loss).backward()
        total += loss.item()
    if not math.isfinite(total):
        raise InputError(f"loss became {total} at step {training.step + 1}: lower the learning rate ({config.lr})")
    training.scaler.unscale_(training.optimizer)
    nn.utils.clip_grad_norm_(training.trained.values(), config.clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad()
    training.losses.append(total)
    return total


def denoising_loss(
    unet: VideoUNet, latents: Tensor, text: Tensor, schedule: Schedule, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Mean squared error of the predicted noise, or v (paper equation 2; Salimans & Ho 2022)."""
    alphas = torch.tensor(schedule.alphas_cumprod, device=latents.device)[timesteps]
    a, s = (x.view(-1, 1, 1, 1, 1) for x in (alphas**0.5, (1 - alphas) ** 0.5))
    target = noise if schedule.prediction_type == "epsilon" else a * noise - s * latents
    return F.mse_loss(unet(a * latents + s * noise, timesteps, text).float(), target)


def seeded_draw(seed: int, latents: Tensor, schedule: Schedule) -> Draw:
    """Noise and timesteps from (seed, step, micro-step) alone, the same on every device."""

    def draw(step: int, micro: int) -> tuple[Tensor, Tensor]:
        digest = hashlib.sha256(f"{seed} {step} {micro}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(len(schedule.alphas_cumprod), (latents.shape[0],), generator=generator)
        return noise.to(latents.device), timesteps.to(latents.device)

    return draw


def lr_factor(config: TrainConfig, step: int) -> float:
    """The part of the learning rate that holds at a step (from 0): warm-up, then constant, linear or cosine decay."""
    if step < config.warmup:
        return step / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1 - done)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _half(unet: VideoUNet, config: TrainConfig | None = None) -> torch.dtype | None:
    """What autocast computes in: what is asked for, or the dtype of frozen weights that are no float32."""
    frozen = unet.conv_in.weight.dtype
    asked = None if config is None else _HALF.get(config.autocast)
    return asked or (None if frozen == torch.float32 else frozen)


def _autocast(unet: VideoUNet, half: torch.dtype | None) -> torch.autocast:
    return torch.autocast(unet.device.type, half, enabled=half is not None)


@contextmanager
def _deterministic() -> Iterator[None]:
    """On CUDA some backward passes add in no fixed order unless told to; on CPU ours all do."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def state_of(training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a run as tensors and a dictionary for JSON."""
    tensors = {"losses": torch.tensor(training.losses, dtype=torch.float64)}
    for name, parameter in training.trained.items():
        tensors[f"master.{name}"] = parameter.detach()
        for moment, value in training.optimizer.state[parameter].items():
            tensors[f"{moment}.{name}"] = value
    return tensors, {"scaler": training.scaler.state_dict()}


def restore(training: Training, tensors: dict[str, Tensor], extra: dict[str, Any]) -> None:
    """Puts a saved state into a training that has just begun."""
    training.losses[:] = tensors["losses"].tolist()
    training.scaler.load_state_dict(extra["scaler"])
    for name, parameter in training.trained.items():
        parameter.data.copy_(tensors[f"master.{name}"])
        # Cloned: what lies in the file is not aligned as PyTorch's own memory is, and sums may depend on that.
        training.optimizer.state[parameter] = {
            moment: tensors[f"{moment}.{name}"].clone().to(parameter.device)
            for moment in ("step", "exp_avg", "exp_avg_sq")
        }


def check(config: TrainConfig, prompt: str) -> None:
    """Raises InputError for settings that no run can follow, naming the value."""
    if not prompt.strip():
        raise InputError("prompt '' is empty: say what the clip shows")
    for name, low, high in (
        ("steps", 1, 10**6),
        ("lr", 0, 1),
        ("warmup", 0, config.steps),
        ("weight_decay", 0, 1),
        ("clip_norm", 0, math.inf),
        ("accumulation", 1, 10**4),
        ("seed", 0, 2**63 - 1),
        ("preview_every", 0, math.inf),
        ("save_every", 1, math.inf),
        ("inversion_steps", 1, 1000),
    ):
        if not low <= (value := getattr(config, name)) <= high:  # false for NaN too
            raise InputError(f"{name} {value} is not within {low}…{high}")
    if config.preview_every and not config.preview_prompts:
        raise InputError(f"preview_every {config.preview_every} needs preview_prompts")


def tune(
    model: str,
    clip: Clip,
    prompt: str,
    config: TrainConfig,
    out: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    source: ClipConfig | None = None,
    on_step: OnStep | None = None,
) -> Checkpoint:
    """Tunes a Stable Diffusion model on a clip and its caption, inverts the clip with it, writes the checkpoint `out`.

    `dtype` is that of the frozen weights; `source` is kept as a note of where the frames came from. A run that was
    stopped goes on where its last state was, to the same weights bit for bit (same machine, same number of threads).
    Raises InputError for bad settings or input, too little memory, a full disk, a folder that holds a finished
    checkpoint, or a stopped run of other settings.
    """
    check(config, prompt)
    if checkpoint.is_checkpoint(out) and not (out / resume.STATE).exists():
        raise InputError(f"{out} holds a finished checkpoint: choose another --out")
    with resume.claim(out), _deterministic():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # attn_temp starts at random where the base is an image model
            sd = models.load(model, dtype=dtype, device=device)
        frames, height, width, _ = clip.frames.shape
        models.check_size(height, width, sd.vae_factor)
        memory.check_tuning(sd, config, frames, height, width)
        settings = _settings(sd, clip, prompt, config)
        training = begin(sd.unet, config)
        if state := resume.load(out, settings):
            restore(training, *state)
        if not checkpoint.is_checkpoint(out):  # else it was killed between its last two acts
            run = _Run.encoded(sd, clip, prompt, config, out, on_step or (lambda *_: None))
            run.train(training, settings)
            run.finish(training, model, settings | ({} if source is None else {"source": asdict(source)}))
        resume.remove(out)
        return checkpoint.load(out)


def _settings(sd: StableDiffusion, clip: Clip, prompt: str, config: TrainConfig) -> dict[str, Any]:
    """All that the resulting weights depend on: a stopped run goes on only under the same."""
    passing = ("preview_every", "preview_prompts", "save_every")
    return {
        "base": checkpoint.base_hash(sd.path),
        "clip": hashlib.sha256(clip.frames.tobytes()).hexdigest(),
        "fps": clip.fps,
        "prompt": prompt,
        **{name: value for name, value in asdict(config).items() if name not in passing},
        "device": sd.unet.device.type,
        "dtype": str(sd.unet.dtype).removeprefix("torch."),
    }


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of tuning: its parts, the clip and the texts encoded once."""

    sd: StableDiffusion
    clip: Clip
    prompt: str
    config: TrainConfig
    out: Path
    on_step: OnStep
    latents: Tensor
    text: Tensor
    """(1, tokens, width) of the caption."""
    empty: Tensor
    """(1, tokens, width) of the empty prompt."""
    previews: Tensor
    """(prompts, tokens, width) of the previews."""

    @classmethod
    def encoded(
        cls, sd: StableDiffusion, clip: Clip, prompt: str, config: TrainConfig, out: Path, on_step: OnStep
    ) -> _Run:
        text = models.encode_prompt(sd, [prompt, "", *config.preview_prompts]).float()
        latents = models.encode_video(sd, clip.frames).float()
        return cls(
            sd=sd,
            clip=clip,
            prompt=prompt,
            config=config,
            out=out,
            on_step=on_step,
            latents=latents,
            text=text[:1],
            empty=text[1:2],
            previews=text[2:],
        )

    def train(self, training: Training, settings: dict[str, Any]) -> None:
        """The remaining steps, with states and previews on the way; the last state is that of the last step."""
        config, schedule = self.config, self.sd.schedule
        draw = seeded_draw(config.seed, self.latents, schedule)
        while training.step < config.steps:
            loss = train_step(training, self.sd.unet, self.latents, self.text, schedule, config, draw)
            step = training.step
            if step % config.save_every == 0 or step == config.steps:
                resume.save(self.out, *state_of(training), settings=settings)
            self.on_step("tune", step, config.steps, loss)
            if config.preview_every and step % config.preview_every == 0:
                self.preview(step)

    def preview(self, step: int) -> None:
        """The edits that the model would make now, under the source, as `previews/step-….png`."""
        start = self.invert()
        edits = [
            ddim.sample(
                self.predict,
                start,
                text[None],
                self.sd.schedule,
                self.config.inversion_steps,
                unconditional=self.empty,
                guidance_scale=EditConfig.guidance_scale,
            )
            for text in self.previews
        ]
        rows = [self.clip.frames, *(models.decode_video(self.sd, edit)[0] for edit in edits)]
        page = sheet.contact_sheet(rows, [self.prompt, *self.config.preview_prompts])
        _save_image(page, self.out / "previews" / f"step-{step:05}.png")

    def finish(self, training: Training, model: str, settings: dict[str, Any]) -> None:
        """Inverts the clip with the values as they will be read back, and writes all files, the description last."""
        own = dict(self.sd.unet.named_parameters())
        values = {name: own[name] for name in clip_value_names(self.sd.unet, self.config.trainable)}
        for value in values.values():
            value.data.copy_(value.half())
        steps = self.config.inversion_steps
        loss = training.losses[-1]

        def report(step: int, _: Tensor) -> None:
            self.on_step("invert", step, steps, loss)

        inverted = self.invert(report)
        save_losses(training.losses, self.out)
        _save_image(sheet.contact_sheet([self.clip.frames], [self.prompt]), self.out / "preview.png")
        frames, height, width, _ = self.clip.frames.shape
        info = ClipInfo(
            base=str(Path(model).resolve()) if Path(model).is_dir() else model,
            base_hash=settings["base"],
            prompt=self.prompt,
            frames=frames,
            height=height,
            width=width,
            fps=self.clip.fps,
            inversion_steps=steps,
        )
        tuned = Checkpoint(info=info, values=values, source_latents=self.latents, inverted_latents=inverted)
        checkpoint.save(tuned, self.out, settings)

    def invert(self, on_step: ddim.OnStep | None = None) -> Tensor:
        """The clip's inversion with the UNet as it is, under the empty prompt."""
        return ddim.invert(
            self.predict, self.latents, self.empty, self.sd.schedule, self.config.inversion_steps, on_step=on_step
        )

    @torch.no_grad()
    def predict(self, latents: Tensor, timestep: int, text: Tensor) -> Tensor:
        unet = self.sd.unet
        timesteps = torch.full((latents.shape[0],), timestep, device=latents.device)
        with _autocast(unet, _half(unet)):  # masters are float32 beside frozen halves
            return unet(latents, timesteps, text).float()


def save_losses(losses: list[float], folder: Path) -> None:
    """Writes `loss.csv` (step, loss) and `loss.png`, where a running mean lies over the single steps."""
    with whole(folder / "loss.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *enumerate(losses, start=1)])
    window = max(1, len(losses) // 20)
    sums = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0)
    means = ((sums[window:] - sums[:-window]) / window).tolist()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, ".", color="#9bb8d3", markersize=4, label="each step")
    axes.plot(range(window, len(losses) + 1), means, color="#1f5a8f", linewidth=2, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", xlim=(0, len(losses) + 1), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    with whole(folder / "loss.png") as temporary:
        figure.savefig(temporary, dpi=120)


def _save_image(image: Any, path: Path) -> None:
    with whole(path) as temporary:
        Image.fromarray(image).save(temporary)
