"""What a suite takes, as units: each is done once, and known by the hash of all that its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from tav_opt import __version__
from tav_opt.base.directory import Base, resolve
from tav_opt.config import EditConfig, MetricsConfig, TrainConfig
from tav_opt.files import sha256
from tav_opt.metrics.background import perceptual_weights
from tav_opt.metrics.clip_encoder import chosen_encoder, network_hash, network_name
from tav_opt.metrics.left_out import LeftOut, library
from tav_opt.suite.suite_types import Method, Suite, SuiteEdit, SuiteVideo

UnitKind = Literal["source", "invert", "tune", "edit", "measure"]
KINDS: tuple[UnitKind, ...] = ("source", "invert", "tune", "edit", "measure")
FORMAT = 1
"""Of the folders of units; another number is another key."""
_NO_MATTER = ("save_every", "preview_every", "preview_prompts", "keep_state")
"""Settings of tuning that change nothing of what comes out."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work and what it needs; `key` is the hash of all that its result depends on."""

    kind: UnitKind
    name: str
    """`VIDEO`, also of what several methods may share, or `METHOD--VIDEO--EDIT`."""
    key: str
    needs: tuple[str, ...] = ()
    """Names of units by `id`."""
    video: SuiteVideo
    method: Method | None = None
    edit: SuiteEdit | None = None

    @property
    def id(self) -> str:
        """Its folder within the results."""
        return f"{self.kind}/{self.name}-{self.key[:16]}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the networks run on, which results depend on too."""

    device: str
    """As torch names it: cpu, cuda, …"""
    dtype: str
    """float32, float16 or bfloat16."""


def units(suite: Suite, place: Place, *, hashed: bool = True) -> list[Unit]:
    """All units of a suite, each after those that it needs; what several methods need alike is one.

    Unless `hashed` keys are of names alone, for a count. Raises InputError where a model or a video is not there.
    """
    return list({unit.id: unit for unit in _Planned(suite, place, hashed).all()}.values())


def model_of(unit: Unit) -> str:
    """Which model a unit works with, by name, "" where with none: units of one name share what is loaded."""
    if unit.kind == "source":
        return "" if unit.video.caption is not None else "captioner"
    method = unit.method
    if unit.kind == "measure" or method is None or method.kind == "folder":
        return ""
    if method.kind == "tune-a-video":
        return f"video {method.tune.seed} {' '.join(method.tune.trainable)}"
    return "image"


def finished(method: Method, video: str, edit: str) -> Path | None:
    """The finished video of a folder's edit: a file of any format that is read, or a folder of frames."""
    assert method.folder is not None
    there = sorted(path for path in (method.folder / video).glob(f"{edit}*") if edit in (path.name, path.stem))
    return there[0] if there else None


def missing_files(suite: Suite) -> list[str]:
    """Each video, mask and finished edit that is not there, by name."""
    gone = [f"video {video.clip.video}" for video in suite.videos if not video.clip.video.exists()]
    gone += [f"mask {video.mask}" for video in suite.videos if video.mask is not None and not video.mask.exists()]
    for method in suite.methods:
        if method.kind == "folder":
            gone += [
                f"{method.name}'s edit {method.folder}/{video.name}/{edit.name}"
                for video in suite.videos
                for edit in video.edits
                if finished(method, video.name, edit.name) is None
            ]
    return gone


@cache
def content(path: Path) -> str:
    """SHA-256 over a file, or over the names and contents of a folder's files."""
    if not path.is_dir():
        return sha256(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    return hashlib.sha256("\n".join(f"{file.name} {sha256(file)}" for file in files).encode()).hexdigest()


@cache
def libraries() -> dict[str, str]:
    """Versions of what some metrics need and not everyone has, and SqueezeNet's file; "" for what is not here."""
    found = {}
    for module in ("cv2", "torchmetrics", "torchvision"):
        try:
            found[module] = str(library(module, module).__version__)
        except LeftOut:
            found[module] = ""
    try:
        found["SqueezeNet"] = sha256(perceptual_weights())
    except LeftOut:
        found["SqueezeNet"] = ""
    return found


def pinned(config: MetricsConfig) -> MetricsConfig:
    """The same with the encoder that `open_encoder` would choose here said, so that no worker chooses another."""
    return config if config.clip is not None else replace(config, clip=chosen_encoder())


def measured_by(config: MetricsConfig) -> dict[str, str]:
    """What decides on metrics and whether they exist: networks by name and hash, libraries by version, as found here.

    Raises InputError for a network that is not here.
    """
    found, config = dict(libraries()), pinned(config)
    for role in ("clip", "pick_score", "dino"):
        if (value := getattr(config, role)) is not None:
            path = resolve(value, network=True)
            found[role] = f"{network_name(value, path)} {network_hash(path)}"
    return found


class _Planned:
    """One plan: what several units share is found once."""

    def __init__(self, suite: Suite, place: Place, hashed: bool) -> None:
        self._suite, self._hashed = suite, hashed
        self._place = {
            "device": torch.device(place.device).type,
            "dtype": place.dtype,
        }  # cuda:1 computes as cuda:0 does
        self._shared: dict[str, Unit] = {}
        kinds = {method.kind for method in suite.methods}
        computes = bool(kinds - {"folder"})
        self._base = Base.at(suite.model).hash if hashed and computes else ""
        networks = measured_by(suite.metrics) if hashed and suite.measured_by is None else suite.measured_by
        self._networks = dict(networks or {}) if hashed else {}
        self._captioner = network_hash(resolve(suite.captioner, network=True)) if hashed and suite.captioner else ""

    def all(self) -> Iterator[Unit]:
        for video in self._suite.videos:
            clip = asdict(replace(video.clip, video=Path(".")))
            caption = video.caption if video.caption is not None else ["made by", self._captioner]
            source = self._unit("source", video.name, video, what=[clip, caption, self._content(video.clip.video)])
            yield source
            for method in self._suite.methods:
                yield from self._of_method(method, video, source)

    def _of_method(self, method: Method, video: SuiteVideo, source: Unit) -> Iterator[Unit]:
        before = self._before(method, video, source)
        if before is not None:
            yield before
        for edit in video.edits:
            name = f"{method.name}--{video.name}--{edit.name}"
            what: list[Any] = [method.kind, edit.prompt]
            if method.kind == "folder":
                found = finished(method, video.name, edit.name)
                what.append("" if found is None else self._content(found))
            else:
                what += [_sampling(method.edit), self._base, self._place]
            needs = (source,) if before is None else (source, before)
            made = self._unit("edit", name, video, needs, method, edit, what=what)
            yield made
            mask = None if video.mask is None else self._content(video.mask)
            measures = [self._networks, mask, edit.prompt]
            yield self._unit("measure", name, video, (source, made), method, edit, what=measures)

    def _before(self, method: Method, video: SuiteVideo, source: Unit) -> Unit | None:
        """What all edits of a video by a method need."""
        if method.kind == "folder":
            return None
        if method.kind == "tune-a-video":
            settings = {k: v for k, v in asdict(method.tune).items() if k not in _NO_MATTER}
            tuned = [settings, method.attention, self._base, self._place]
            return self._unit("tune", video.name, video, (source,), method, what=tuned)
        inverted = [method.edit.steps, self._base, self._place]
        return self._unit("invert", video.name, video, (source,), method, what=inverted)

    def _content(self, path: Path) -> str:
        return content(path.absolute()) if self._hashed else str(path)

    def _unit(
        self,
        kind: UnitKind,
        name: str,
        video: SuiteVideo,
        needs: tuple[Unit, ...] = (),
        method: Method | None = None,
        edit: SuiteEdit | None = None,
        *,
        what: list[Any],
    ) -> Unit:
        told = json.dumps([FORMAT, __version__, kind, what, [unit.key for unit in needs]], sort_keys=True, default=str)
        key = hashlib.sha256(told.encode()).hexdigest()
        ids = tuple(unit.id for unit in needs)
        unit = Unit(kind=kind, name=name, key=key, needs=ids, video=video, method=method, edit=edit)
        return self._shared.setdefault(key, unit) if kind in ("tune", "invert") else unit


def _sampling(config: EditConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in ("prompts", "inversion_steps")}


def tuned_steps(train: TrainConfig) -> int:
    """Optimiser steps and those of the inversion after them."""
    return train.steps + train.inversion_steps
