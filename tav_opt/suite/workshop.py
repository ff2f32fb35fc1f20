"""What a worker does with a unit, and what it keeps between units: the model in hand, and the networks that measure."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tav_opt import checkpoint, ddim, editing, models, tuning, tuning_state, video
from tav_opt.base.directory import Base
from tav_opt.config import InputError
from tav_opt.device import usable_device
from tav_opt.engines.pytorch import TorchEngine, engine_on
from tav_opt.files import read_object, write_json
from tav_opt.metrics.edited import Edited
from tav_opt.metrics.measuring import Networks, measure
from tav_opt.models import StableDiffusion
from tav_opt.solvers import solver
from tav_opt.suite import captions, fresh_model
from tav_opt.suite.each_frame import without_sparse_causal
from tav_opt.suite.fresh_model import FreshModel
from tav_opt.suite.image_baselines import PlugAndPlay, invert_frames, predict_frames
from tav_opt.suite.suite_types import Method, Suite
from tav_opt.suite.unit_store import UnitStore
from tav_opt.suite.units import Place, Unit, finished, measured_by, model_of
from tav_opt.video.masks import fitted_mask

FRAMES, CLIP, SOURCE = "frames.npy", "source.mp4", "source.json"
"""Of a source: its frames as they are, a video to be looked at, caption and frames per second."""
EDIT, METRICS, PASSED = "edit.mp4", "metrics.json", "passed.safetensors"
FREE_SECONDS = 30
OnStep = Callable[[str, int, int], object]
"""Told of stage, steps done, steps."""


@dataclass
class Workshop:
    """One worker, in this process; one unit after the other."""

    suite: Suite
    place: Place
    store: UnitStore
    _held: tuple[str, Any] | None = field(default=None, init=False)
    """The one model in hand, by what it is."""
    _loads: int = field(default=0, init=False)
    """How often that was loaded."""
    _networks: Networks | None = field(default=None, init=False)
    _base: Base | None = field(default=None, init=False)

    def do(self, unit: Unit, on_step: OnStep = lambda *_: None) -> None:
        """Makes the unit's result, unless it is there. What it raises has left nothing that counts."""
        if self.store.keep(unit):
            return
        if unit.kind == "tune":
            self._tune(unit, on_step)
            return
        about: dict[str, Any] = {}
        work = {"source": self._source, "invert": self._invert, "edit": self._edit, "measure": self._measure}
        before = self._loads
        with self.store.writing(unit, about) as folder:
            work[unit.kind](unit, folder, about, on_step)
            about["model_loaded"] = self._loads > before

    # What is held.

    @property
    def _device(self) -> torch.device:
        return usable_device(self.place.device)

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.place.dtype)

    def _model(self) -> Base:
        self._base = self._base or Base.at(self.suite.model)
        return self._base

    def _hold(self, name: str, load: Callable[[], Any]) -> Any:
        """What is loaded under a name; the one before goes first, since two may not fit."""
        if self._held is None or self._held[0] != name:
            self._held = None
            self._held = (name, load())
            self._loads += 1
        return self._held[1]

    def _image_model(self, unit: Unit) -> StableDiffusion:
        load = lambda: models.load_image(self._model(), dtype=self._dtype, device=self._device)  # noqa: E731
        return self._hold(model_of(unit), load)

    def _video_model(self, unit: Unit) -> StableDiffusion:
        """The base, inflated, as tuning begins with it, whatever was done with it before."""
        load = lambda: FreshModel.load(self._model(), _of(unit).tune, self._device, self._dtype)  # noqa: E731
        fresh: FreshModel = self._hold(model_of(unit), load)
        return fresh.again()

    def _engine(self, unit: Unit) -> TorchEngine:
        """A tuned clip on its base."""
        tuned = checkpoint.load(self.store.fetched(unit.needs[1]))
        return engine_on(self._video_model(unit), tuned, self._device)

    # The units.

    def _source(self, unit: Unit, folder: Path, _about: dict[str, Any], _on_step: OnStep) -> None:
        clip = video.read(unit.video.clip)
        if unit.video.mask is not None:  # looked at now, not after all tuning; measured by as it is then
            fitted_mask(unit.video.mask, unit.video.clip)
        caption = unit.video.caption
        if caption is None:
            assert self.suite.captioner is not None
            load = lambda: captions.Captioner.open(self.suite.captioner or "", self._device)  # noqa: E731
            caption = self._hold(model_of(unit), load).caption(clip.frames)
        np.save(folder / FRAMES, clip.frames)
        video.write(folder / CLIP, clip.frames, clip.fps)
        made = unit.video.caption is None
        write_json(folder / SOURCE, {"caption": caption, "caption_made": made, "fps": clip.fps})

    def _tune(self, unit: Unit, on_step: OnStep) -> None:
        clip, caption = self._read(unit)
        method = _of(unit)
        about: dict[str, Any] = {}
        before = self._loads
        with self.store.continuing(unit, about) as folder:
            if checkpoint.is_checkpoint(folder) and not (folder / tuning_state.STATE).exists():
                return  # stopped between its last file and the note that it is whole
            with without_sparse_causal() if method.attention == "each-frame" else nullcontext():
                tune = partial(
                    tuning.tune,
                    self.suite.model,
                    clip,
                    caption,
                    method.tune,
                    folder,
                    device=self._device,
                    dtype=self._dtype,
                    source=replace(unit.video.clip, video=unit.video.clip.video.absolute()),
                    on_step=lambda stage, step, steps, _loss: on_step(stage, step, steps),
                    loaded=lambda: self._video_model(unit),
                )
                _once_free(tune)
            about["model_loaded"] = self._loads > before
            if not fresh_model.is_kept(method.tune):
                self._held = None

    def _invert(self, unit: Unit, folder: Path, _about: dict[str, Any], on_step: OnStep) -> None:
        clip, _ = self._read(unit)
        sd = self._image_model(unit)
        models.check_size(clip.frames.shape[1], clip.frames.shape[2], sd.vae_factor)
        latents = models.encode_video(sd, clip.frames)
        steps = _of(unit).edit.steps
        passed = invert_frames(
            sd, latents, models.encode_prompt(sd, ""), steps, lambda s: on_step("invert", s.number, s.total)
        )
        checkpoint.save_tensors({"passed": passed.cpu().contiguous()}, folder / PASSED)

    def _edit(self, unit: Unit, folder: Path, about: dict[str, Any], on_step: OnStep) -> None:
        assert unit.edit is not None
        method, clip = _of(unit), self._read(unit)[0]
        if method.kind == "folder":
            frames = self._finished(unit, clip)
        elif method.kind == "tune-a-video":
            engine = self._engine(unit)
            config = replace(method.edit, prompts=(unit.edit.prompt,))
            with without_sparse_causal() if method.attention == "each-frame" else nullcontext():
                frames = editing.edit(engine, config, on_progress=on_step)[0]
        else:
            frames = self._by_the_image_model(unit, method, on_step)
        about["prompt"] = unit.edit.prompt
        video.write(folder / EDIT, frames, clip.fps, {"method": method.name, "prompt": unit.edit.prompt})

    def _by_the_image_model(self, unit: Unit, method: Method, on_step: OnStep) -> np.ndarray:
        assert unit.edit is not None
        sd, config = self._image_model(unit), replace(method.edit, prompts=(unit.edit.prompt,))
        editing.check(config)
        passed = load_file(self.store.fetched(unit.needs[1]) / PASSED)["passed"].to(self._device, self._dtype)
        text = models.encode_prompt(sd, [config.negative_prompt, *config.prompts])
        empty = models.encode_prompt(sd, "")
        start = passed[-1:]
        if not config.inversion:
            start = torch.randn(start.shape, generator=torch.Generator().manual_seed(config.seed)).to(start)
        told = lambda step: on_step(step.stage, step.number, step.total)  # noqa: E731
        if method.kind == "per-frame":
            predict: ddim.Predict = lambda *given: predict_frames(sd, *given)  # noqa: E731
            return models.decode_video(sd, _sampled(sd, predict, start, text, config, told))[0]
        with PlugAndPlay(sd, passed, empty, config.steps).installed() as predict:
            return models.decode_video(sd, _sampled(sd, predict, start, text, config, told))[0]

    def _finished(self, unit: Unit, clip: video.Clip) -> np.ndarray:
        """A finished video, fitted to the clip's size; as many frames as the clip's, or all that the clip is of."""
        assert unit.edit is not None
        method = _of(unit)
        path = finished(method, unit.video.name, unit.edit.name)
        if path is None:
            raise InputError(f"{method.name}: {method.folder}/{unit.video.name}/{unit.edit.name} is gone")
        count, height, width, _ = clip.frames.shape
        frames = video.read(path, height=height, width=width, fit=unit.video.clip.fit).frames
        if len(frames) != count:
            raise InputError(f"{path} has {len(frames)} frames, the clip {count}: they must be alike, frame by frame")
        return frames

    def _measure(self, unit: Unit, folder: Path, about: dict[str, Any], _on_step: OnStep) -> None:
        assert unit.edit is not None
        clip, caption = self._read(unit)
        made = self.store.fetched(unit.needs[1]) / EDIT
        edited = Edited(
            frames=video.read(made).frames,  # what is measured is the file that people look at
            source=clip.frames,
            prompt=unit.edit.prompt,
            source_prompt=caption,
            mask=None if unit.video.mask is None else fitted_mask(unit.video.mask, unit.video.clip),
        )
        if self._networks is None:
            self._networks = self._open_networks()
        measured = measure(edited, self._networks, made)
        about.update(measured.to_json())
        write_json(folder / METRICS, measured.to_json())

    def _open_networks(self) -> Networks:
        """Raises InputError where this machine would measure by other networks or libraries than the driver's."""
        expected, metrics = self.suite.measured_by, self.suite.metrics
        found = expected if expected is None else measured_by(metrics)
        if expected is not None and found is not None and found != expected:
            name = next(name for name in {**expected, **found} if found.get(name) != expected.get(name))
            here, there = (which.get(name) or "nothing" for which in (found, expected))
            raise InputError(f"{os.uname().nodename} would measure by {name} {here}, the driver by {there}: install it")
        return Networks.open(replace(metrics, device=self.place.device))

    def _read(self, unit: Unit) -> tuple[video.Clip, str]:
        """Frames and caption of a unit's source, which has been read once."""
        folder = self.store.fetched(unit.needs[0])
        told = read_object(folder / SOURCE)
        frames = np.load(folder / FRAMES, allow_pickle=False)
        return video.Clip(frames=frames, fps=float(told["fps"])), str(told["caption"])


def _once_free(tune: Callable[[], object]) -> None:
    """A worker that was given up may hold its clip for a moment yet."""
    for _ in range(FREE_SECONDS):
        try:
            tune()
            return
        except tuning_state.Claimed:
            time.sleep(1)
    tune()


def _of(unit: Unit) -> Method:
    assert unit.method is not None
    return unit.method


def _sampled(
    sd: StableDiffusion, predict: ddim.Predict, start: Tensor, text: Tensor, config: Any, on_step: ddim.OnStep
) -> Tensor:
    """As `editing.sample` does for an engine: latents (1,c,f,h,w), text the negative prompt's and the prompt's."""
    return ddim.sample(
        predict,
        start,
        text[1:],
        sd.schedule,
        config.steps,
        unconditional=text[:1],
        guidance_scale=config.guidance_scale,
        guidance_interval=config.guidance_interval,
        solver=solver(config.solver, config.steps),
        eta=config.eta,
        generator=torch.Generator().manual_seed(config.seed),
        on_step=on_step,
    )
