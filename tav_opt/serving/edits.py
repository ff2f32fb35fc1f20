"""One request, from its tensors to the last response; nothing here knows of Triton."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tav_opt import ddim, editing, video
from tav_opt.conditions import condition
from tav_opt.conditions.condition import Condition
from tav_opt.config import InputError
from tav_opt.contract import ClipInfo, Request, check_request, edit_metadata, from_tensors, same_speed
from tav_opt.ddim import Text, Timestep
from tav_opt.engines import Engine
from tav_opt.memory.promises import Memory
from tav_opt.serving import previews
from tav_opt.serving.batching import Batches
from tav_opt.serving.failures import Unavailable
from tav_opt.serving.inversions import Inversions, key
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
        """Another for every export, and for every engine."""

    def predict(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        """`timestep`: one for all rows, or int64 (b,)."""

    def decode(self, latents: Tensor, on_part: GoOn = lambda: None) -> np.ndarray:
        """As every engine; `on_part` is called before each call of the VAE."""

    def extra_bytes(self, prompts: int, *, encode: bool = False, controls: Collection[str] = ()) -> int:
        """Memory that an edit of so many prompts in one batch needs beyond what is held; `encode`: of other frames.

        `controls`: the networks whose maps it follows.
        """


@dataclass(frozen=True, kw_only=True)
class Editor:
    """What edits are made with; any number of threads may ask."""

    clips: Callable[[str], ServedEngine]
    """Raises UnknownClip, Unavailable, and RuntimeError for a damaged one."""
    inversions: Inversions
    decode: Decode
    """Decodes a video file that was sent."""
    memory: Memory
    """Of the device."""
    batches: Batches = field(default_factory=Batches)
    preview_maps: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)
    """By the clip's revision."""

    def answer(
        self, tensors: Mapping[str, np.ndarray], send: Send, go_on: GoOn, report: Report
    ) -> dict[str, np.ndarray]:
        """Answers one request: sends a progress response after every step and returns the last response.

        `tensors` are STREAM_INPUTS, responses STREAM_OUTPUTS. Raises InputError for a bad request, what `clips` raises,
        Unavailable where memory is short, FloatingPointError where an inversion comes to nothing, and what `go_on`
        raises, within one step or call of the network.
        """
        go_on()
        request = from_tensors(tensors)
        report.request = request
        editing.check(request.edit)
        with report.stage("open"):
            engine = self.clips(request.clip)
        request = replace(request, edit=engine.info.edited(request.edit, request.given, request.preset))
        check_request(request)
        report.request, report.engine = request, engine.kind
        _check_source(request, engine)
        if names := [one.name for one in request.edit.controls]:
            condition.check(request.edit.controls, names, engine.networks)

        progress = _Progress(send, go_on, report)
        with ExitStack() as stack:

            def choose() -> int:
                report.at_once, needed = _prompts_at_once(
                    engine, request, self.memory.free(), beside=self.batches.prompts(engine)
                )
                stack.enter_context(self.batches.counted(engine, report.at_once))
                return needed

            with self.memory.promised(choose):
                return self._edited(engine, request, progress)

    def _edited(self, engine: ServedEngine, request: Request, progress: _Progress) -> dict[str, np.ndarray]:
        """The last response."""
        report = progress.report
        text = editing.encode_prompts(engine, request.edit)
        with self.batches.joined(engine, report) as joined:
            following = self._following(engine, request, progress)
            start = self._start(joined, request, progress, following)
            with report.stage("sample"):
                sampled = self._sampled(joined, request, text, start, progress, following)
        with report.stage("render"):
            result = _result(engine, request, _rendered(engine, sampled, progress.go_on))
        steps = report.steps["sample"]
        return {**told("done", steps, steps), **result, "fps": np.array([request.fps or engine.info.fps], np.float32)}

    def _following(self, engine: ServedEngine, request: Request, progress: _Progress) -> list[Condition]:
        """What the edit follows."""
        if not request.edit.controls:
            return []
        with progress.report.stage("decode"):
            videos = [self.decode(video, engine.info, progress.go_on) for video in request.control_videos]
            names = [one.name for one in request.edit.controls]
            return editing.conditions(engine, request.edit, dict(zip(names, videos, strict=True)))

    def _start(
        self, engine: ServedEngine, request: Request, progress: _Progress, following: Sequence[Condition]
    ) -> Tensor:
        """The latents that sampling starts from: computed only where they are neither the clip's nor kept."""
        report, config = progress.report, request.edit
        inversion = engine.info.inversion_of(config)
        own = request.video is None and request.source_frames is None
        kept = own and inversion.key == engine.info.inversion.key and not config.control_inversion
        if not config.inversion or kept:
            report.inversion = "clip" if config.inversion else "noise"
            return editing.start_latents(engine, config)

        def compute() -> Tensor:
            frames = self._frames(engine, request, progress)
            with report.stage("invert"):
                return editing.start_latents(
                    engine, config, frames, progress.step, following=following, on_call=progress.go_on
                )

        name = key(engine.revision, inversion, _content(request))
        latents, report.inversion = self.inversions.get(name, compute, progress.go_on)
        return latents.to(engine.source_latents.device)

    def _frames(self, engine: ServedEngine, request: Request, progress: _Progress) -> np.ndarray | None:
        if request.video is None:
            return request.source_frames
        with progress.report.stage("decode"):
            return self.decode(request.video, engine.info, progress.go_on)

    def _sampled(
        self,
        engine: ServedEngine,
        request: Request,
        text: Tensor,
        start: Tensor,
        progress: _Progress,
        following: Sequence[Condition],
    ) -> Tensor:
        """→ (prompts, c, f, h, w)"""
        at_once = progress.report.at_once

        def on_step(step: ddim.Step) -> None:
            batch, done = divmod(step.number - 1, request.edit.steps)
            if request.preview_interval and (done + 1) % request.preview_interval == 0:
                colours = self._preview_map(engine, progress.go_on)
                progress.show(len(request.edit.prompts), batch * at_once, previews.picture(step.clean, colours))
            progress.step(step)

        sampled = editing.sample(
            engine, request.edit, text, start, at_once=at_once, following=following, on_step=on_step
        )
        return torch.cat(list(sampled))

    def _preview_map(self, engine: ServedEngine, go_on: GoOn) -> Tensor:
        found = self.preview_maps.get(engine.revision)
        if found is None:
            source = engine.source_latents
            found = self.preview_maps[engine.revision] = previews.fit(source, _rendered(engine, source, go_on)[0])
            while len(self.preview_maps) > PREVIEW_MAPS:
                self.preview_maps.popitem(last=False)
        return found


class _Progress:
    """Told of every step: sends it, and goes on or not."""

    def __init__(self, send: Send, go_on: GoOn, report: Report) -> None:
        self._send, self.go_on, self.report = send, go_on, report
        self._preview: np.ndarray | None = None
        self._preview_is_due = False

    def show(self, prompts: int, first: int, found: np.ndarray) -> None:
        """Adds to the next response a preview of all the prompts, where those from `first` on are new."""
        if self._preview is None:
            self._preview = np.zeros((prompts, *found.shape[1:]), np.uint8)
        self._preview[first : first + len(found)] = found
        self._preview_is_due = True

    def step(self, step: ddim.Step) -> None:
        """What `go_on` raises goes through."""
        self.report.steps[step.stage] = step.number
        self.go_on()
        response = told(step.stage, step.number, step.total)
        if self._preview is not None and self._preview_is_due:
            response["preview"] = self._preview.copy()
            self._preview_is_due = False
        self._send(response)


def told(stage: str, step: int, steps: int) -> dict[str, np.ndarray]:
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
    """What an inversion is of: a file is told apart by its bytes, so that one seen before need not be decoded.

    What an edit follows is part of it where the source is inverted with it, and only there.
    """
    found = "clip"
    if request.video is not None:
        found = f"video {hashlib.sha256(request.video).hexdigest()}"
    if request.source_frames is not None:
        found = f"frames {hashlib.sha256(request.source_frames.tobytes()).hexdigest()}"
    if request.edit.control_inversion:
        videos = [hashlib.sha256(video).hexdigest() for video in request.control_videos]
        found += f" following {request.edit.controls} {videos}"
    return found


def _prompts_at_once(engine: ServedEngine, request: Request, free: int, *, beside: int) -> tuple[int, int]:
    """How many prompts one batch may have `beside` those of other edits, and the bytes that it needs.

    Raises Unavailable where memory is short of one.
    """
    prompts = len(request.edit.prompts)
    encode = request.video is not None or request.source_frames is not None
    promised = engine.extra_bytes(beside) if beside else 0  # by those edits
    controls = {"controls": [one.name for one in request.edit.controls]} if request.edit.controls else {}

    def bytes_of(prompts: int) -> int:
        """For them alone, and for what they add to the others' batch: whichever is more."""
        together = engine.extra_bytes(prompts + beside, encode=encode, **controls) - promised
        return max(together, engine.extra_bytes(prompts, encode=encode, **controls))

    while (needed := bytes_of(prompts)) > free:
        if prompts == 1:
            raise Unavailable(
                f"the edit needs about {needed / 2**30:.2f} GiB, the server has {free / 2**30:.2f} GiB free: "
                "try again later"
            )
        prompts = (prompts + 1) // 2
    return prompts, needed


def _rendered(engine: ServedEngine, latents: Tensor, go_on: GoOn) -> np.ndarray:
    """Latents (b, c, f, h, w) → uint8 (b, f, H, W, 3); it can stop between parts."""
    return engine.decode(latents, go_on)


def _result(engine: ServedEngine, request: Request, frames: np.ndarray) -> dict[str, np.ndarray]:
    metadata = [
        edit_metadata(
            engine.info,
            request.clip,
            request.edit,
            [prompt],
            engine=engine.kind,
            with_prompts=request.prompt_metadata,
        )
        for prompt in request.edit.prompts
    ]
    told = {"metadata": np.array([json.dumps(one, ensure_ascii=False).encode() for one in metadata], np.object_)}
    if request.output == "frames":
        return {"frames": frames, **told}
    files = np.empty(len(frames), np.object_)
    own = request.video is None and request.source_frames is None and same_speed(request.fps, engine.info.fps)
    sound, fps = engine.sound if own else None, request.fps or engine.info.fps
    files[:] = [video.encode_mp4(edit, fps, one, sound=sound) for edit, one in zip(frames, metadata, strict=True)]
    return {"video": files, **told}
