"""What all exported clips share, whatever runs their graphs: no runtime is imported here."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tav_opt import checkpoint
from tav_opt.base.textual_inversion import spelt_out
from tav_opt.checkpoint import Checkpoint
from tav_opt.clip_folder import ClipFolder
from tav_opt.conditions.condition import HINT, Network
from tav_opt.conditions.framewise import Adapter, ControlNet
from tav_opt.config import ClipConfig, EngineName, InputError, texts
from tav_opt.contract import MAX_PROMPTS, VERSION, ClipInfo
from tav_opt.ddim import Schedule, Text, Timestep, timestep_rows
from tav_opt.repository import layout, specs
from tav_opt.repository.layout import MANIFEST, check_unaltered, info_of
from tav_opt.repository.specs import GraphSpec, TensorSpec
from tav_opt.reuse import FEATURES
from tav_opt.video.pixels import to_frames, to_host, to_unit
from tav_opt.windows import begins

Call = Callable[..., dict[str, Tensor]]
"""A graph by its inputs' names → its outputs by theirs, their first axis as long as the inputs'."""


NETWORKS: dict[str, Callable[..., Network]] = {"controlnet": ControlNet, "adapter": Adapter}
"""What follows maps, by the first word of its graph's name; its own name follows."""


class Late:
    """A call that is made ready when it is first asked for."""

    def __init__(self, ready: Callable[[], Call]) -> None:
        self._ready, self._lock = ready, threading.Lock()
        self._call: Call | None = None

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        with self._lock:
            self._call = self._call or self._ready()
        return self._call(**inputs)


class Graphs(Protocol):
    """The graphs of one base as one runtime has opened them, on one device."""

    device: torch.device
    revision: str
    """Another for every runtime, and for every set of files of its own."""
    frames_at_once: int
    """What the VAE takes in one call."""
    has_threads: bool
    """Whether the runtime computes on threads of its own, with which PyTorch's must not compete."""
    made_by: str
    """The export's options by which graphs that were added to the base are made for it."""

    def of_clip(self, values: Mapping[str, Tensor]) -> tuple[Mapping[str, Call], int]:
        """Each graph with a clip's own values, by the names of graphs' inputs; and the bytes that they hold.

        Graphs that were added to the base are loaded when they are first asked for.
        """

    def extra_bytes(self, items: Mapping[str, int]) -> int:
        """What runs of graphs on so many items each need beyond what is held."""


@dataclass(frozen=True, kw_only=True)
class ExportedBase:
    """What all clips of one base model and size share: its graphs, tokenizer and schedule."""

    folder: Path
    revision: str
    """Of its files and of what runs them."""
    latents: tuple[int, ...]
    """(1, c, f, h, w) that the UNet takes; a clip may have more frames."""
    tokenizer: Tokenizer
    tokens: int
    value_inputs: dict[str, str]
    """Graphs' inputs by the parameter of a clip that they stand for."""
    schedule: Schedule
    engine: EngineName
    graphs: Graphs
    added: Mapping[str, GraphSpec] = field(default_factory=dict)
    """Graphs that came to it later, by name."""

    @classmethod
    def open(cls, folder: Path, engine: EngineName, open_graphs: Callable[[], Graphs]) -> ExportedBase:
        """Opens `base/<…>` of an exported repository.

        Raises InputError when it is missing, of another version, or one of its files is missing or altered.
        """
        from tav_opt.schemas import BaseManifest

        manifest = layout.manifest(folder, BaseManifest)
        if manifest.get("version") != VERSION:
            raise InputError(f"{folder}: version {manifest.get('version')!r} is not {VERSION}: export it again")
        check_unaltered(folder, (*(spec.file for spec in specs.read(folder).values()), "tokenizer.json"))
        graphs = open_graphs()
        return cls(
            folder=folder,
            revision=revision_of([manifest["files"], engine, graphs.revision]),
            tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
            latents=(1, *manifest["latents"]),
            tokens=manifest["tokens"],
            value_inputs=specs.value_inputs(folder),
            schedule=Schedule.from_config(manifest["scheduler"]),
            engine=engine,
            graphs=graphs,
            added=specs.added(folder),
        )

    def unet_for(self, told: Collection[str]) -> str:
        """The graph of the UNet that takes just these tensors, `text` among them, beside latents and timestep.

        Raises InputError where there is none, naming what others take.
        """
        further = set(told) - {"text"}
        if not further:
            return "unet"
        plain = {name: spec for name, spec in self.added.items() if spec.is_unet and not spec.gives_features}
        variants = {name: set(spec.further) for name, spec in plain.items()}
        found = next((name for name, taken in variants.items() if taken == further), None)
        if found is None:
            there = "; ".join(f"{name} takes {', '.join(sorted(taken))}" for name, taken in variants.items())
            raise InputError(
                f"base {self.folder.name} has no UNet that takes {', '.join(sorted(further))}"
                f"{there and f' ({there})'}: export it with what the edit asks for"
            )
        return found

    @property
    def unet_with_features(self) -> str:
        """The graph of the UNet that gives features; raises InputError where there is none."""
        found = next((name for name, spec in self.added.items() if spec.gives_features), None)
        if found is None:
            raise InputError(f"base {self.folder.name} has no UNet that gives features: export it with that")
        return found

    def tokenize(self, prompts: str | Sequence[str]) -> Tensor:
        """→ ids (prompts, tokens), padded; raises InputError naming the words beyond the tokenizer's length."""
        given = [spelt_out(self.tokenizer, prompt) for prompt in texts("prompts", prompts)]
        encoded = [encoding.ids for encoding in self.tokenizer.encode_batch(given)]
        for ids in encoded:
            if len(ids) > self.tokens:
                # CLIP's pieces end words with </w>, which the tokenizers library leaves in.
                beyond = self.tokenizer.decode(ids[self.tokens - 1 : -1]).replace("</w>", " ").strip()
                raise InputError(f"prompt is {len(ids)} tokens long, {self.tokens} at most; too much: {beyond!r}")
        return torch.tensor(encoded, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class ExportedEngine:
    """An exported clip on its base; see `engines.Engine`."""

    base: ExportedBase
    info: ClipInfo
    revision: str
    """Of its values, latents and base: another export of the clip has another."""
    source_latents: Tensor
    inverted_latents: Tensor
    calls: Mapping[str, Call]
    held_bytes: int
    """Of its values and latents in memory."""
    sound: bytes | None = None

    @classmethod
    def open(cls, folder: Path, base: ExportedBase) -> ExportedEngine:
        """Opens `clips/<name>` on its base.

        Raises InputError when the clip is missing or altered, or belongs to another base.
        """
        info = info_of(folder)
        if info.exported_base != base.folder.name:
            raise InputError(f"clip {folder.name} belongs to base {info.exported_base}, not to {base.folder.name}")
        tuned = checkpoint.load(ClipFolder(folder, MANIFEST))
        specs.check_values(base.folder, {name: value.shape for name, value in tuned.values.items()})
        expected = (*base.latents[:2], info.frames, *base.latents[3:])
        if (shape := tuple(tuned.source_latents.shape)) != expected or info.network_frames != base.latents[2]:
            raise InputError(f"clip {folder.name}: latents {shape}, but {base.folder.name} takes {base.latents}")
        return cls.of(tuned, base, revision_of([layout.manifest(folder), base.revision]))

    @classmethod
    def of(cls, tuned: Checkpoint, base: ExportedBase, revision: str) -> ExportedEngine:
        """A clip that need not be written yet."""
        calls, held = base.graphs.of_clip({base.value_inputs[name]: value for name, value in tuned.values.items()})
        latents = [x.to(base.graphs.device) for x in (tuned.source_latents, tuned.inverted_latents)]
        return cls(
            base=base,
            info=tuned.info,
            revision=revision,
            source_latents=latents[0],
            inverted_latents=latents[1],
            calls=calls,
            held_bytes=held + sum(x.nbytes for x in latents),
            sound=tuned.sound,
        )

    def extra_bytes(
        self,
        prompts: int,
        *,
        encode: bool = False,
        windows: int = 1,
        told: Collection[str] = ("text",),
        controls: Collection[str] = (),
        frames: int = 0,
    ) -> int:
        """Memory that an edit of so many prompts in one batch needs beyond what is held; `encode`: of other frames.

        `windows` of a long clip go through the network at once; `told`: the names of what the UNet is told; `controls`:
        the networks whose maps it follows, at some steps without the others, of so many `frames` where the source has
        more than the clip.
        """
        part = min(self.frames_at_once, self.info.frames)
        networks = {name: spec for name, spec in self.base.added.items() if name.partition("_")[2] in controls}
        networks = {name: spec for name, spec in networks.items() if not spec.is_unet}
        added = {output.name: _bytes(output) for spec in networks.values() for output in spec.outputs}  # of a frame
        unets = {self.base.unet_for(told)}
        kept = 0
        if FEATURES in told:  # of each window, from step to step
            unets.add(self.base.unet_with_features)
            spec = self.base.added[self.base.unet_with_features]
            count = len(begins(max(frames, self.info.frames), self.info.network_frames))
            kept = 2 * prompts * (count + windows) * _bytes(spec.outputs[-1])
        if networks:
            told_of = {name: {*spec.further} for name, spec in self.base.added.items() if spec.is_unet and spec.further}
            unets |= {name for name, further in told_of.items() if further <= added.keys()}
        items = {"text_encoder": MAX_PROMPTS + 1, "vae_decoder": part, "vae_encoder": part * encode}
        items |= dict.fromkeys(networks, part) | dict.fromkeys(unets, 2 * prompts * windows)
        items = {name: count for name, count in items.items() if name in self.calls}  # what is not, is refused
        pixels = self.info.frames * self.info.height * self.info.width * 3
        # What is added: as the networks give it, of all frames, and as the UNet takes it.
        both = max(frames, self.info.frames) + windows * self.info.network_frames
        # The frames of all prompts as they are put together, and in the response.
        return self.base.graphs.extra_bytes(items) + kept + 2 * prompts * (pixels + both * sum(added.values()))

    @property
    def source(self) -> ClipConfig | None:
        """An export keeps no note of it."""
        return None

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    @property
    def kind(self) -> EngineName:
        """What runs it."""
        return self.base.engine

    @property
    def frames_at_once(self) -> int:
        """What the VAE takes in one call: its memory grows with them."""
        return self.base.graphs.frames_at_once

    @cached_property
    def networks(self) -> Mapping[str, Network]:
        """Those that were exported with the base for its runtime; raises InputError where none of them was."""
        there = {graph: spec for graph, spec in self.base.added.items() if graph.partition("_")[0] in NETWORKS}
        if there and not there.keys() & self.calls.keys():
            self._made(min(there))
        found: dict[str, Network] = {}
        for graph in there.keys() & self.calls.keys():
            kind, _, name = graph.partition("_")
            names = tuple(output.name for output in there[graph].outputs)
            seeing = {"see": partial(self._hint, name)} if kind == "controlnet" else {}
            found[name] = NETWORKS[kind](run=self.calls[graph], names=names, at_once=self.frames_at_once, **seeing)
        return found

    def _hint(self, name: str, maps: Tensor) -> dict[str, Tensor]:
        """What a ControlNet sees of maps; raises InputError for one that was exported before there were such graphs."""
        if (graph := f"{HINT}_{name}") not in self.base.added:
            raise InputError(
                f"base {self.base.folder.name} has controlnet_{name} of an export that made no {graph} beside it: "
                "export it under another name, or to another --repository"
            )
        return self.calls[self._made(graph)](maps=maps)

    def _made(self, graph: str) -> str:
        if graph not in self.calls:
            made_by = self.base.graphs.made_by
            raise InputError(f"{self.kind} has not {graph} of base {self.base.folder.name}: export it with {made_by}")
        return graph

    def encode_text(self, prompts: str | Sequence[str]) -> Tensor:
        return self.calls["text_encoder"](input_ids=self.base.tokenize(prompts))["text"]

    def encode_video(self, frames: np.ndarray) -> Tensor:
        exported = (self.info.network_frames, self.info.height, self.info.width, 3)
        if len(frames) < exported[0] or frames.shape[1:] != exported[1:]:
            told = f"frames are {frames.shape} (f, H, W, 3), but the clip was exported for {exported}"
            raise InputError(f"{told}, or more frames")
        parts = [frames[first : first + self.frames_at_once] for first in range(0, len(frames), self.frames_at_once)]
        latents = torch.cat([self.calls["vae_encoder"](pixels=to_unit(part))["latents"] for part in parts])
        return latents.transpose(0, 1)[None]  # f c h w → 1 c f h w

    @property
    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer

    def check_told(self, told: Collection[str]) -> None:
        self._made(self.base.unet_for(told))

    def predict(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        """`timestep`: one for all rows, or int64 (b,); the names of what is told choose the graph."""
        told = {"text": text} if isinstance(text, Tensor) else text
        unet = self._made(self.base.unet_for(told))
        return self.calls[unet](latents=latents, timestep=timestep_rows(timestep, latents), **told)["noise"]

    def predict_with_features(self, latents: Tensor, timestep: Timestep, text: Tensor) -> tuple[Tensor, Tensor]:
        unet = self._made(self.base.unet_with_features)
        found = self.calls[unet](latents=latents, timestep=timestep_rows(timestep, latents), text=text)
        return found["noise"], found[FEATURES]

    def decode(self, latents: Tensor, on_part: Callable[[], object] = lambda: None) -> np.ndarray:
        """As every engine; `on_part` is called before each call of the VAE, and what it raises goes through."""
        frames = []
        for clip in latents.transpose(1, 2):
            for part in clip.split(self.frames_at_once):  # f c h w
                on_part()
                frames.append(to_frames(self.calls["vae_decoder"](latents=part)["pixels"]))
        return to_host(torch.cat(frames)).reshape(latents.shape[0], -1, *frames[0].shape[1:])


def _bytes(spec: TensorSpec) -> int:
    """Of one item."""
    return math.prod(spec.fixed(1)) * np.dtype(spec.dtype).itemsize


def revision_of(description: Any) -> str:
    """Another for every other description, which names all files by their hashes."""
    return sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
