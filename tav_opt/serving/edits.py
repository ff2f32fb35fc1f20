"""One request, from its tensors to the last response; nothing here knows of Triton."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tav_opt import editing, video
from tav_opt.config import InputError
from tav_opt.contract import ClipInfo, Request, from_tensors
from tav_opt.engines import Engine
from tav_opt.engines.onnxruntime import FRAMES_AT_ONCE
from tav_opt.serving import previews
from tav_opt.serving.failures import Unavailable
from tav_opt.serving.inversions import Inversions, key
from tav_opt.serving.memory import Memory
from tav_opt.serving.report import Report

Send = Callable[[dict[str, np.ndarray]], None]
GoOn = Callable[[], None]
"""Raises ddim.Stopped when the edit shall stop."""
Decode = Callable[[bytes, ClipInfo, GoOn], np.ndarray]

PREVIEW_MAPS = 64
"""A few hundred bytes each."""


class ServedEngine(Engine, Protocol):
    """An exported clip."""

    @property
    def revision(self) -> str:
        """Another for every export."""

    def extra_bytes(self, prompts: int, *, encode: bool = False) -> int:
        """Memory that an edit of so many prompts in one batch needs beyond what is held; `encode`: of other frames."""


@dataclass(frozen=True, kw_only=True)
class Editor:
    """What edits are made with, one at a time."""

    clips: Callable[[str], ServedEngine]
    """Raises UnknownClip, Unavailable, and RuntimeError for a damaged one."""
    inversions: Inversions
    decode: Decode
    """Decodes a video file that was sent."""
    memory: Memory
    """Of the device."""
    preview_maps: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)
    """By the clip's revision."""

    def answer(
        self, tensors: Mapping[str, np.ndarray], send: Send, go_on: GoOn, report: Report
    ) -> dict[str, np.ndarray]:
        """Answers one request: sends a progress response after every step and returns the last response.

        `tensors` are STREAM_INPUTS, responses STREAM_OUTPUTS. Raises InputError for a bad request, what `clips` raises,
        Unavailable where memory is short, and within one step what `go_on` raises.
        """
        go_on()
        request = from_tensors(tensors)
        report.request = request
        editing.check(request.edit)
        with report.stage("open"):
            engine = self.clips(request.clip)
        _check_source(request, engine)

        def choose() -> int:
            report.at_once, needed = _prompts_at_once(engine, request, self.memory.free())
            return needed

        with self.memory.promised(choose):
            return self._edited(engine, request, _Progress(send, go_on, report))

    def _edited(self, engine: ServedEngine, request: Request, on_progress: _Progress) -> dict[str, np.ndarray]:
        """The last response."""
        report = on_progress.report
        text = editing.encode_prompts(engine, request.edit)
        start = self._start(engine, request, on_progress)
        with report.stage("sample"):
            sampled = self._sampled(engine, request, text, start, on_progress)
        with report.stage("render"):
            result = _result(engine, request, _rendered(engine, sampled, on_progress.go_on))
        steps = report.steps["sample"]
        return {**progress("done", steps, steps), **result, "fps": np.array([engine.info.fps], np.float32)}

    def _start(self, engine: ServedEngine, request: Request, on_progress: _Progress) -> Tensor:
        """The latents that sampling starts from: computed only where they are neither the clip's nor kept."""
        report, config = on_progress.report, request.edit
        steps = config.inversion_steps or engine.info.inversion_steps
        own = request.video is None and request.source_frames is None
        if not config.inversion or (own and steps == engine.info.inversion_steps):
            report.inversion = "clip" if config.inversion else "noise"
            return editing.start_latents(engine, config)

        def compute() -> Tensor:
            frames = self._frames(engine, request, on_progress)
            with report.stage("invert"):
                return editing.start_latents(engine, config, frames, on_progress)

        name = key(engine.revision, steps, _content(request))
        latents, report.inversion = self.inversions.get(name, compute, on_progress.go_on)
        return latents.to(engine.source_latents.device)

    def _frames(self, engine: ServedEngine, request: Request, on_progress: _Progress) -> np.ndarray | None:
        if request.video is None:
            return request.source_frames
        with on_progress.report.stage("decode"):
            return self.decode(request.video, engine.info, on_progress.go_on)

    def _sampled(
        self, engine: ServedEngine, request: Request, text: Tensor, start: Tensor, on_progress: _Progress
    ) -> Tensor:
        """→ (prompts, c, f, h, w)"""
        batches = editing.sample(
            engine,
            request.edit,
            text,
            start,
            at_once=on_progress.report.at_once,
            on_progress=on_progress,
            on_clean=partial(self._preview, engine, request, on_progress) if request.preview_interval else None,
        )
        return torch.cat(list(batches))

    def _preview(
        self, engine: ServedEngine, request: Request, on_progress: _Progress, first: int, step: int, clean: Tensor
    ) -> None:
        """Adds a preview to the next progress response, if one is due."""
        if step % request.preview_interval:
            return
        found = previews.picture(clean, self._preview_map(engine, on_progress.go_on))
        if on_progress.preview is None:
            on_progress.preview = np.zeros((len(request.edit.prompts), *found.shape[1:]), np.uint8)
        on_progress.preview[first : first + len(found)] = found
        on_progress.preview_is_due = True

    def _preview_map(self, engine: ServedEngine, go_on: GoOn) -> Tensor:
        if engine.revision not in self.preview_maps:
            source = engine.source_latents
            self.preview_maps[engine.revision] = previews.fit(source, _rendered(engine, source, go_on)[0])
            while len(self.preview_maps) > PREVIEW_MAPS:
                self.preview_maps.popitem(last=False)
        return self.preview_maps[engine.revision]


class _Progress:
    """Called after every step: sends it, and goes on or not."""

    def __init__(self, send: Send, go_on: GoOn, report: Report) -> None:
        self._send, self.go_on, self.report = send, go_on, report
        self.preview: np.ndarray | None = None
        self.preview_is_due = False

    def __call__(self, stage: str, step: int, steps: int) -> None:
        self.report.steps[stage] = step
        self.go_on()
        told = progress(stage, step, steps)
        if self.preview is not None and self.preview_is_due:
            told["preview"] = self.preview.copy()
            self.preview_is_due = False
        self._send(told)


def progress(stage: str, step: int, steps: int) -> dict[str, np.ndarray]:
    """The tensors that every response has."""
    return {
        "stage": np.array([stage.encode()], np.object_),
        "step": np.array([step], np.int32),
        "steps": np.array([steps], np.int32),
    }


def _check_source(request: Request, engine: ServedEngine) -> None:
    info, frames = engine.info, request.source_frames
    if frames is not None and frames.shape != (info.frames, info.height, info.width, 3):
        count, height, width, _ = frames.shape
        raise InputError(
            f"input source_frames has {count} frames of {width}×{height}; "
            f"clip {request.clip} takes {info.frames} frames of {info.width}×{info.height}"
        )


def _content(request: Request) -> str:
    """What an inversion is of: a file is told apart by its bytes, so that one seen before need not be decoded."""
    if request.video is not None:
        return f"video {hashlib.sha256(request.video).hexdigest()}"
    if request.source_frames is not None:
        return f"frames {hashlib.sha256(request.source_frames.tobytes()).hexdigest()}"
    return "clip"


def _prompts_at_once(engine: ServedEngine, request: Request, free: int) -> tuple[int, int]:
    """How many prompts one batch may have, and the bytes it needs; raises Unavailable where memory is short of one."""
    prompts = len(request.edit.prompts)
    encode = request.video is not None or request.source_frames is not None
    while (needed := engine.extra_bytes(prompts, encode=encode)) > free:
        if prompts == 1:
            raise Unavailable(
                f"the edit needs about {needed / 2**30:.2f} GiB, the server has {free / 2**30:.2f} GiB free: "
                "try again later"
            )
        prompts = (prompts + 1) // 2
    return prompts, needed


def _rendered(engine: ServedEngine, latents: Tensor, go_on: GoOn) -> np.ndarray:
    """Latents (b, c, f, h, w) → uint8 (b, f, H, W, 3), in parts, so that it can stop between them."""
    info = engine.info
    frames = np.empty((len(latents), info.frames, info.height, info.width, 3), np.uint8)
    for number, edit in enumerate(latents.split(1)):
        for first in range(0, info.frames, FRAMES_AT_ONCE):
            go_on()
            part = slice(first, first + FRAMES_AT_ONCE)
            frames[number, part] = engine.decode(edit[:, :, part])[0]
    return frames


def _result(engine: ServedEngine, request: Request, frames: np.ndarray) -> dict[str, np.ndarray]:
    if request.output == "frames":
        return {"frames": frames}
    files = np.empty(len(frames), np.object_)
    files[:] = [video.encode_mp4(edit, engine.info.fps) for edit in frames]
    return {"video": files}
