"""One request, from its tensors to the last response; nothing here knows of Triton."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tav_opt import ddim, editing, video
from tav_opt.conditions import condition
from tav_opt.conditions.condition import Condition
from tav_opt.config import InputError, WorkerConfig
from tav_opt.contract import Request, check_request, edit_metadata, from_tensors, same_speed
from tav_opt.memory.promises import Memory
from tav_opt.serving import previews
from tav_opt.serving.batching import Batches
from tav_opt.serving.decoding import Wanted
from tav_opt.serving.edit_memory import bytes_of_length, prompts_at_once
from tav_opt.serving.inversions import Inversions, key
from tav_opt.serving.report import Report
from tav_opt.serving.served_engine import GoOn, ServedEngine
from tav_opt.video import masks

Send = Callable[[dict[str, np.ndarray]], None]
Decode = Callable[[bytes, Wanted, GoOn], np.ndarray]

Source = Callable[[], Tensor | None]
"""The latents of what was sent in the clip's place, encoded when they are first asked for."""
Following = Callable[[int], Sequence[Condition]]
"""What an edit of so many frames follows, its networks asked when it is first wanted."""

PREVIEW_MAPS = 64
"""A few hundred bytes each."""


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
    longest_source: int = WorkerConfig.longest_source
    windows_at_once: int = WorkerConfig.windows_at_once
    response_bytes: int = WorkerConfig.response_mib << 20

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
        editing.check(request.edit, complete=False)
        with report.stage("open"):
            engine = self.clips(request.clip)
        request = replace(request, edit=engine.info.edited(request.edit, request.given, request.preset))
        check_request(request)
        editing.check(request.edit)
        editing.check_engine(engine, request.edit)
        report.request, report.engine = request, engine.kind
        _check_source(request, engine, self.longest_source)
        if names := [one.name for one in request.edit.controls]:
            condition.check(request.edit.controls, names, engine.networks)

        progress = _Progress(send, go_on, report)
        with ExitStack() as stack:

            def choose() -> int:
                report.at_once, needed = prompts_at_once(
                    engine,
                    request,
                    self.memory.free(),
                    beside=self.batches.prompts(engine),
                    windows=self._windows(engine, request),
                )
                stack.enter_context(self.batches.counted(engine, report.at_once))
                return needed

            promise = stack.enter_context(ExitStack())
            promise.enter_context(self.memory.promised(choose))
            return self._edited(engine, request, progress, promise)

    def _windows(self, engine: ServedEngine, request: Request) -> int:
        """How many go through the network at once, if there may be more than one."""
        sent = request.video is not None or request.source_frames is not None
        return self.windows_at_once if sent or engine.info.window is not None else 1

    def _longer(self, engine: ServedEngine, request: Request, start: Tensor, report: Report) -> int:
        """Bytes of an edit of more frames than the clip's; raises Unavailable without them."""
        beside, windows = self.batches.prompts(engine) - report.at_once, self._windows(engine, request)
        free = self.memory.free()
        return bytes_of_length(engine, request, start, report.at_once, free, beside=beside, windows=windows)

    def _edited(
        self, engine: ServedEngine, request: Request, progress: _Progress, promise: ExitStack
    ) -> dict[str, np.ndarray]:
        """The last response; the `promise` of memory is made anew where the source has more frames than the clip."""
        report = progress.report
        text = editing.encode_prompts(engine, request.edit)
        mask = self._mask(engine, request, progress)
        source = cache(lambda: self._source(engine, request, progress))
        with self.batches.joined(engine, report) as joined:
            maps = self._maps(engine, request, progress)
            following = cache(lambda frames: editing.conditions(engine, request.edit, maps, frames))
            start = self._start(joined, request, source, following, progress)
            acting = following(start.shape[2])
            if start.shape[2] > engine.info.frames:
                promise.close()
                promise.enter_context(self.memory.promised(lambda: self._longer(engine, request, start, report)))
            blend = None if mask is None else _blend(engine, request, mask, source(), start)
            with report.stage("sample"):
                sampled = self._sampled(joined, request, text, start, blend, acting, progress)
        with report.stage("render"):
            result = self._result(engine, request, sampled, progress)
        steps = report.steps["sample"]
        return {**told("done", steps, steps), **result, "fps": np.array([request.fps or engine.info.fps], np.float32)}

    def _source(self, engine: ServedEngine, request: Request, progress: _Progress) -> Tensor | None:
        """The latents (1, c, f, h, w) of what was sent in the clip's place; None where that is nothing."""
        frames, info = request.source_frames, engine.info
        if request.video is not None:
            most = max(self.longest_source, info.network_frames)
            wanted = Wanted(least=info.network_frames, most=most, height=info.height, width=info.width)
            with progress.report.stage("decode"):
                frames = self.decode(request.video, wanted, progress.go_on)
        return None if frames is None else engine.encode_video(frames)

    def _maps(self, engine: ServedEngine, request: Request, progress: _Progress) -> dict[str, np.ndarray]:
        """What the edit's controls follow, uint8 (f, H, W, 3) by their names."""
        info, sent = engine.info, request.source_frames
        least = most = info.frames if sent is None else len(sent)
        if request.video is not None:
            least, most = info.network_frames, max(self.longest_source, info.network_frames)
        wanted = Wanted(name="control_video", least=least, most=most, height=info.height, width=info.width)
        found: dict[str, np.ndarray] = {}
        for one, file in zip(request.edit.controls, request.control_videos, strict=True):
            with progress.report.stage("decode"):
                found[one.name] = self.decode(file, wanted, progress.go_on)
        return found

    def _start(
        self, engine: ServedEngine, request: Request, source: Source, following: Following, progress: _Progress
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
            found = source()
            with report.stage("invert"):
                calls = editing.Calls(windows_at_once=self.windows_at_once, on_call=progress.go_on)
                frames = engine.info.frames if found is None else found.shape[2]
                acting = following(frames) if config.control_inversion else ()
                return editing.start_latents(engine, config, found, progress.step, following=acting, calls=calls)

        name = key(engine.revision, inversion, _content(request))
        latents, report.inversion = self.inversions.get(name, compute, progress.go_on)
        return latents.to(engine.source_latents.device)

    def _mask(self, engine: ServedEngine, request: Request, progress: _Progress) -> np.ndarray | None:
        """Where the picture may change, bool (f, H, W), where that was sent."""
        if request.mask is None:
            return None
        info = engine.info
        most = max(self.longest_source, info.frames)
        wanted = Wanted(name="mask", least=1, most=most, height=info.height, width=info.width)
        with progress.report.stage("decode"):
            return masks.of_frames(self.decode(request.mask, wanted, progress.go_on))

    def _sampled(
        self,
        engine: ServedEngine,
        request: Request,
        text: Tensor,
        start: Tensor,
        blend: ddim.Blend | None,
        following: Sequence[Condition],
        progress: _Progress,
    ) -> Tensor:
        """→ (prompts, c, f, h, w)"""
        at_once = progress.report.at_once

        def on_step(step: ddim.Step) -> None:
            batch, done = divmod(step.number - 1, request.edit.steps)
            if request.preview_interval and (done + 1) % request.preview_interval == 0:
                colours = self._preview_map(engine, progress.go_on)
                progress.show(len(request.edit.prompts), batch * at_once, previews.picture(step.clean, colours))
            progress.step(step)

        is_long = start.shape[2] > engine.info.network_frames  # else one call is one step, after which it is asked
        on_call = progress.go_on if is_long else lambda: None
        calls = editing.Calls(windows_at_once=self.windows_at_once, on_call=on_call)
        batches = editing.sample(
            engine,
            request.edit,
            text,
            start,
            at_once=at_once,
            blend=blend,
            following=following,
            calls=calls,
            on_step=on_step,
        )
        return torch.cat(list(batches))

    def _preview_map(self, engine: ServedEngine, go_on: GoOn) -> Tensor:
        found = self.preview_maps.get(engine.revision)
        if found is None:
            source = engine.source_latents[:, :, : engine.info.network_frames]
            found = self.preview_maps[engine.revision] = previews.fit(source, _rendered(engine, source, go_on)[0])
            while len(self.preview_maps) > PREVIEW_MAPS:
                self.preview_maps.popitem(last=False)
        return found

    def _result(
        self, engine: ServedEngine, request: Request, sampled: Tensor, progress: _Progress
    ) -> dict[str, np.ndarray]:
        """What the last response has of it; frames that are too many for one response are sent before."""
        metadata = _metadata(engine, request)
        told = {"metadata": np.array([json.dumps(one, ensure_ascii=False).encode() for one in metadata], np.object_)}
        if request.output == "mp4":
            return {"video": _files(engine, request, sampled, metadata, progress.go_on), **told}
        frame_bytes = len(sampled) * engine.info.height * engine.info.width * 3
        count, frames = max(1, self.response_bytes // frame_bytes), sampled.shape[2]
        if frames <= count:
            return {"frames": _rendered(engine, sampled, progress.go_on), **told}
        for first in range(0, frames, count):
            part = sampled[:, :, first : first + count]
            progress.render(_rendered(engine, part, progress.go_on), first + part.shape[2], frames)
        return told


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

    def render(self, part: np.ndarray, frames: int, of: int) -> None:
        """Sends the next frames (prompts, f, H, W, 3) of a large result, of which so many are there with them."""
        self.go_on()
        self._send({**told("render", frames, of), "frames": part})


def told(stage: str, step: int, steps: int) -> dict[str, np.ndarray]:
    """The tensors that every response has."""
    return {
        "stage": np.array([stage.encode()], np.object_),
        "step": np.array([step], np.int32),
        "steps": np.array([steps], np.int32),
    }


def _check_source(request: Request, engine: ServedEngine, longest: int) -> None:
    info, frames = engine.info, request.source_frames
    if frames is None:
        return
    most = max(longest, info.network_frames)
    if not info.network_frames <= len(frames) <= most or frames.shape[1:] != (info.height, info.width, 3):
        count, height, width, _ = frames.shape
        wanted = Wanted(least=info.network_frames, most=most, height=info.height, width=info.width)
        raise InputError(
            f"input source_frames has {count} frames of {width}×{height}; clip {request.clip} takes {wanted}"
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


def _blend(
    engine: ServedEngine, request: Request, mask: np.ndarray, source: Tensor | None, start: Tensor
) -> ddim.Blend:
    """What keeps the source where a mask is black; raises InputError for one that does not fit."""
    if len(mask) not in (1, start.shape[2]):
        raise InputError(f"input mask has {len(mask)} frames: must have 1, or {start.shape[2]} as the source has")
    return editing.blend(engine, request.edit, mask, engine.source_latents if source is None else source, start)


def _rendered(engine: ServedEngine, latents: Tensor, go_on: GoOn) -> np.ndarray:
    """Latents (b, c, f, h, w) → uint8 (b, f, H, W, 3); it can stop between parts."""
    return engine.decode(latents, go_on)


def _metadata(engine: ServedEngine, request: Request) -> list[dict[str, Any]]:
    """Of each prompt's edit."""
    about = partial(
        edit_metadata,
        engine.info,
        request.clip,
        request.edit,
        engine=engine.kind,
        masked=request.mask is not None,
        with_prompts=request.prompt_metadata,
    )
    return [about([prompt]) for prompt in request.edit.prompts]


def _files(
    engine: ServedEngine, request: Request, sampled: Tensor, metadata: list[dict[str, Any]], go_on: GoOn
) -> np.ndarray:
    """An MP4 of each prompt, rendered and encoded one after the other."""
    own = request.video is None and request.source_frames is None and same_speed(request.fps, engine.info.fps)
    sound, fps = engine.sound if own else None, request.fps or engine.info.fps
    files = np.empty(len(sampled), np.object_)
    for number, (latents, one) in enumerate(zip(sampled, metadata, strict=True)):
        frames = _rendered(engine, latents[None], go_on)[0]
        files[number] = video.encode_mp4(frames, fps, one, sound=sound)
    return files
