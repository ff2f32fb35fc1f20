"""One-shot tuning of the inflated UNet on one clip and one caption (paper section 3.2 and 4.1)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tav_opt import checkpoint, ddim, editing, inversion, models, plots, tuning_loop, tuning_state, video
from tav_opt.base.directory import Base
from tav_opt.checkpoint import Checkpoint
from tav_opt.clip_folder import ClipFolder
from tav_opt.config import (
    BaseConfig,
    ClipConfig,
    EditConfig,
    InputError,
    PathLike,
    TrainConfig,
)
from tav_opt.contract import ClipInfo
from tav_opt.device import dtype_on, usable_device
from tav_opt.engines.pytorch import TorchEngine
from tav_opt.files import DESCRIPTION, check_place
from tav_opt.memory import eager
from tav_opt.models import StableDiffusion
from tav_opt.tuning_step import Training, begin, seeded_draw, train_step
from tav_opt.unet import clip_value_names
from tav_opt.video import Clip, contact_sheet
from tav_opt.video.restoring import Shape

Stage = Literal["tune", "invert"]
OnStep = Callable[[Stage, int, int, float], object]
"""Called with the stage, the steps done, the steps of the stage, and the last loss."""


def check(config: TrainConfig, prompt: str) -> None:
    """Raises InputError for settings that no run can follow, naming the value."""
    tuning_loop.check(config, prompt, "the clip shows")


def tune(
    model: PathLike | BaseConfig,
    clip: Clip,
    prompt: str,
    config: TrainConfig,
    out: PathLike,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    source: ClipConfig | None = None,
    edit: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
    loaded: Callable[[], StableDiffusion] | None = None,
) -> Checkpoint:
    """Tunes a Stable Diffusion on a clip and its caption, inverts the clip with it, writes the checkpoint `out`.

    `dtype` is what the networks compute in, the device's own unless given (device.dtype_on); what trains has float32
    masters in any case, and they are what the checkpoint keeps. `source` is kept as a note
    of where the frames came from, `edit` as the clip's own settings of edits (contract.EDIT_DEFAULTS). `loaded` gives
    the model as `load` does, for who keeps it between clips. A run that was
    stopped goes on where its last state was: on processors to the same weights bit for bit (same machine, same number
    of threads); GPUs are asked for the same, which none has shown yet.
    Ctrl-C and SIGTERM save the state after the present step, then raise Interrupted. With a constant learning rate a
    run whose state is there can go on to more steps, a finished one too (`config.keep_state`).
    Raises InputError for bad settings or input, too little memory, a full disk, a folder that holds a finished
    checkpoint, or a stopped run of other settings.
    """
    out = Path(out)
    check(config, prompt)
    check_out(out)
    with tuning_loop.running(out):
        sd = loaded() if loaded is not None else load(model, config, device=device, dtype=dtype)
        frames, height, width, _ = clip.frames.shape
        config = _of_clip(config, frames)
        models.check_size(height, width, sd.vae_factor)
        sd.schedule.timesteps(config.inversion_steps)  # too many are refused now, not after tuning
        if config.gradient_checkpointing is None:  # a stopped run goes on as it began, whatever is free now
            config = replace(config, gradient_checkpointing=tuning_state.settings(out).get("gradient_checkpointing"))
        config = eager.fit_tuning(sd, config, config.window or frames, height, width)
        settings = _settings(sd, clip, prompt, config)
        training = begin(sd.unet, config)
        finished = tuning_loop.resume(training, out, settings, config, _finished_steps(out))
        if not finished:  # else it was killed between its last two acts
            info = _info(model, sd, settings, clip, dict(edit or {}))
            run = _Run.encoded(sd, info, clip, config, out, on_step or (lambda *_: None))
            run.train(training, settings)
            run.finish(training, settings | ({} if source is None else {"source": asdict(source)}))
        if not config.keep_state:
            tuning_state.remove(out)
        return checkpoint.load(out)


def load(
    model: PathLike | BaseConfig | Base,
    config: TrainConfig,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
) -> StableDiffusion:
    """A model as tuning begins with it: what an image model lacks is drawn by the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # attn_temp starts at random where the base is an image model
        place = usable_device(device)
        return models.load(model, dtype=dtype_on(place, dtype), device=place)


def _of_clip(config: TrainConfig, frames: int) -> TrainConfig:
    """A window of all frames is none; raises InputError for a longer one."""
    if config.window is not None and config.window > frames:
        raise InputError(f"window {config.window}: the clip has {frames} frames")
    return replace(config, window=None) if config.window == frames else config


def check_out(out: Path) -> None:
    """Raises InputError where no run can write: a place without rights, or a finished run that cannot go on."""
    check_place(out / tuning_state.STATE)
    if checkpoint.is_checkpoint(out) and not (out / tuning_state.STATE).exists():
        raise InputError(
            f"{out} holds a finished checkpoint: choose another --out (it could go on to more --steps only if it had "
            f"been tuned with --keep-state)"
        )


def _finished_steps(out: Path) -> int | None:
    """The steps of the checkpoint that is there, if one is."""
    found = ClipFolder.found(out)
    return None if found is None else found.settings.get("steps")


def _settings(sd: StableDiffusion, clip: Clip, prompt: str, config: TrainConfig) -> dict[str, Any]:
    """All that the resulting weights depend on: a stopped run goes on only under the same."""
    passing = {*tuning_loop.PASSING}
    if not config.inversion_iterations:
        passing.add("inversion_iterations")  # of which states of before say nothing
    if config.window is None:
        passing.add("window")  # nor of it
    return {
        "base": sd.base.hash,
        "clip": hashlib.sha256(clip.frames.tobytes()).hexdigest(),
        "fps": clip.fps,
        "prompt": prompt,
        **{name: value for name, value in asdict(config).items() if name not in passing},
        "device": sd.unet.device.type,
        "dtype": str(sd.unet.dtype).removeprefix("torch."),
    }


def _info(
    model: PathLike | BaseConfig, sd: StableDiffusion, settings: dict[str, Any], clip: Clip, edit: dict[str, Any]
) -> ClipInfo:
    frames, height, width, _ = clip.frames.shape
    name = model.model if isinstance(model, BaseConfig) else os.fspath(model)
    return ClipInfo(
        base=str(Path(name).resolve()) if Path(name).exists() else name,
        additions=sd.base.additions,
        base_hash=settings["base"],
        prompt=settings["prompt"],
        frames=frames,
        height=height,
        width=width,
        fps=clip.fps,
        inversion_steps=settings["inversion_steps"],
        inversion_iterations=settings.get("inversion_iterations", 0),
        window=settings.get("window"),
        **({} if clip.shape is None else _of_shape(clip.shape)),
        edit=edit,
    )


def _of_shape(shape: Shape) -> dict[str, Any]:
    return {"source_height": shape.height, "source_width": shape.width, "fit": shape.fit}


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of tuning: its parts, the clip and the texts encoded once."""

    engine: TorchEngine
    clip: Clip
    config: TrainConfig
    out: Path
    on_step: OnStep
    text: Tensor
    """(1, tokens, width) of the caption."""
    empty: Tensor
    """(1, tokens, width) of the empty prompt."""

    @classmethod
    def encoded(
        cls, sd: StableDiffusion, info: ClipInfo, clip: Clip, config: TrainConfig, out: Path, on_step: OnStep
    ) -> _Run:
        # The previews' prompts too: one that is too long is refused now.
        text = models.encode_prompt(sd, [info.prompt, "", *config.preview_prompts]).float()
        latents = models.encode_video(sd, clip.frames)
        engine = TorchEngine(sd=sd, info=info, source_latents=latents, inverted_latents=latents)  # as long as none are
        return cls(engine=engine, clip=clip, config=config, out=out, on_step=on_step, text=text[:1], empty=text[1:2])

    def train(self, training: Training, settings: dict[str, Any]) -> None:
        """The remaining steps."""
        config, schedule, unet = self.config, self.engine.schedule, self.engine.sd.unet
        latents = self.engine.source_latents
        draw = seeded_draw(config.seed, latents[:, :, : config.window], schedule)
        tuning_loop.train(
            training,
            config,
            self.out,
            settings,
            lambda: train_step(training, unet, latents, self.text, schedule, config, draw),
            lambda step, loss: self.on_step("tune", step, config.steps, loss),
            self.preview,
        )

    def preview(self, step: int, interrupted: tuning_loop.Stop) -> None:
        """The edits that the model would make now, under the source, as `previews/step-….png`."""

        def go_on(*_: object) -> None:
            if interrupted():
                raise ddim.Stopped

        prompts = self.config.preview_prompts
        asked = EditConfig(prompts=prompts, steps=self.config.inversion_steps)
        engine = self.inverted(go_on)
        edits = editing.edit(engine, engine.info.edited(asked, ("steps", "inversion")), on_progress=go_on)
        page = contact_sheet.contact_sheet([self.clip.frames, *edits], [engine.info.prompt, *prompts])
        video.write_png(self.out / "previews" / f"step-{step:05}.png", page)

    def finish(self, training: Training, settings: dict[str, Any]) -> None:
        """Inverts the clip with the values as they will be read back, and writes all files, the description last."""
        unet = self.engine.sd.unet
        found = {**dict(unet.named_parameters()), **training.trained}
        values = {name: found[name].detach().half() for name in clip_value_names(unet, self.config.trainable)}
        models.put_values(unet, values)
        loss = training.losses[-1]
        engine = self.inverted(lambda step: self.on_step("invert", step.number, step.total, loss))
        plots.save_losses(training.losses, self.out)
        sheet = contact_sheet.contact_sheet([self.clip.frames], [engine.info.prompt])
        video.write_png(self.out / "preview.png", sheet)
        tuned = Checkpoint(
            info=engine.info,
            values=values,
            source_latents=engine.source_latents,
            inverted_latents=engine.inverted_latents,
            sound=self.clip.sound,
        )
        (self.out / DESCRIPTION).unlink(missing_ok=True)  # of a run with fewer steps, whose files are replaced now
        checkpoint.save(tuned, self.out, settings)

    def inverted(self, on_step: ddim.OnStep) -> TorchEngine:
        """The engine with the clip's inversion by the UNet as it is, under the empty prompt."""
        engine = self.engine
        latents = inversion.invert(
            editing.Calls().predict(engine),
            engine.source_latents,
            self.empty,
            engine.schedule,
            self.config.inversion,
            on_step=on_step,
        )
        return replace(engine, inverted_latents=latents)
