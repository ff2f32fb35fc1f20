"""Exported graphs in ONNX Runtime: one set of sessions a base, shared by all clips tuned on it."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from hashlib import sha256 as hash_of
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tav_opt.checkpoint import load_tensors
from tav_opt.config import InputError
from tav_opt.contract import MAX_PROMPTS, STREAM_MODEL, VERSION, ClipInfo, check_clip_name
from tav_opt.ddim import Schedule
from tav_opt.engines.working_memory import WorkingMemory
from tav_opt.files import read_json, sha256
from tav_opt.pixels import to_frames, to_unit

GRAPHS = ("text_encoder", "vae_encoder", "unet", "vae_decoder")
MANIFEST = "manifest.json"
FRAMES_AT_ONCE = 4
"""The VAE's frames in one call: its memory grows with them."""

_NUMPY = {torch.float32: np.float32, torch.int64: np.int64}


def session(path: Path, device: torch.device, threads: int | None = None) -> Any:
    """Opens an ONNX file; raises InputError where onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError("onnxruntime is not installed: pip install 'tav-opt[cpu]', or [gpu]") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Left to itself, onnxruntime pins a thread to every core of the machine, also to those it may not use.
    options.intra_op_num_threads = threads or usable_cores()
    # With patterns the second run of a shape asks for all of its memory in one piece, beside what the first left.
    options.enable_mem_pattern = False
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}))
    return onnxruntime.InferenceSession(path, options, providers=providers)


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_device() -> torch.device:
    """The GPU where both PyTorch and onnxruntime have one."""
    try:
        import onnxruntime
    except ImportError:
        return torch.device("cpu")  # opening a session says what is missing
    on_gpu = torch.cuda.is_available() and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return torch.device("cuda" if on_gpu else "cpu")


def revision_of(description: Any) -> str:
    """Another for every other description, which names all files by their hashes."""
    return hash_of(json.dumps(description, sort_keys=True).encode()).hexdigest()


class Bound:
    """A session whose tensors lie in PyTorch's memory, on its device: nothing is copied in or out.

    `values` stay bound from call to call. One call at a time.
    """

    def __init__(self, session: Any, device: torch.device, values: dict[str, Tensor] | None = None) -> None:
        self._session, self._device = session, device
        self._binding = session.io_binding()
        self._values = {name: self._bind(name, value) for name, value in (values or {}).items()}
        self._output = session.get_outputs()[0]
        self._lock = threading.Lock()

    def _bind(self, name: str, value: Tensor) -> Tensor:
        value = value.to(self._device).contiguous()
        self._binding.bind_input(
            name, self._device.type, self._device.index or 0, _NUMPY[value.dtype], tuple(value.shape), value.data_ptr()
        )
        return value

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The graph's one float32 output; its free first axis is as long as the inputs'."""
        with self._lock:
            held = [self._bind(name, value) for name, value in inputs.items()]  # alive until the run ends
            shape = (held[0].shape[0], *self._output.shape[1:])
            output = torch.empty(shape, dtype=torch.float32, device=self._device)
            self._binding.bind_output(
                self._output.name, self._device.type, self._device.index or 0, np.float32, shape, output.data_ptr()
            )
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # onnxruntime works on a stream of its own
            self._session.run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
            return output


@dataclass(frozen=True, kw_only=True)
class OnnxBase:
    """What all clips of one base model and size share: its graphs, tokenizer and schedule."""

    folder: Path
    revision: str
    """Of its files."""
    sessions: dict[str, Any]
    tokenizer: Tokenizer
    tokens: int
    value_inputs: dict[str, str]
    """Graph inputs of the UNet by the parameter that they stand for."""
    schedule: Schedule
    device: torch.device
    working: dict[str, WorkingMemory]
    """Of each graph."""
    held: dict[str, int] = field(default_factory=dict)
    """Bytes that each graph's arena has grown to by its largest run so far; it keeps them for the next one."""

    @classmethod
    def open(cls, folder: Path, *, threads: int | None = None, device: torch.device | None = None) -> OnnxBase:
        """Opens `base/<…>` of an exported repository on a device, the best one unless told.

        Raises InputError when it is missing, of another version, or one of its files is missing or altered.
        """
        manifest = read_json(folder / MANIFEST)
        if manifest.get("version") != VERSION:
            raise InputError(f"{folder}: version {manifest.get('version')!r} is not {VERSION}: export it again")
        _verify(folder, manifest, [*(f"{name}.onnx" for name in GRAPHS), "tokenizer.json"])
        device = best_device() if device is None else device
        return cls(
            folder=folder,
            revision=revision_of(manifest["files"]),
            sessions={name: session(folder / f"{name}.onnx", device, threads) for name in GRAPHS},
            tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
            tokens=manifest["tokens"],
            value_inputs=manifest["values"],
            schedule=Schedule.from_config(manifest["scheduler"]),
            device=device,
            working={name: WorkingMemory.of(folder / f"{name}.onnx") for name in GRAPHS},
        )

    def extra_bytes(self, items: dict[str, int]) -> int:
        """What runs of graphs on so many items each need beyond the arenas that are there."""
        return sum(max(0, self.working[name].bytes(count) - self.held.get(name, 0)) for name, count in items.items())

    def ran(self, name: str, items: int) -> None:
        """Takes note of the arena that a run leaves behind."""
        self.held[name] = max(self.held.get(name, 0), self.working[name].bytes(items))

    def tokenize(self, prompts: list[str]) -> Tensor:
        """→ ids (prompts, tokens), padded; raises InputError naming the words beyond the tokenizer's length."""
        encoded = [encoding.ids for encoding in self.tokenizer.encode_batch(prompts)]
        for ids in encoded:
            if len(ids) > self.tokens:
                # CLIP's pieces end words with </w>, which the tokenizers library leaves in.
                beyond = self.tokenizer.decode(ids[self.tokens - 1 : -1]).replace("</w>", " ").strip()
                raise InputError(f"prompt is {len(ids)} tokens long, {self.tokens} at most; too much: {beyond!r}")
        return torch.tensor(encoded, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class OnnxEngine:
    """An exported clip on its base; see `engines.Engine`."""

    base: OnnxBase
    info: ClipInfo
    revision: str
    """Of its values, latents and base: another export of the clip has another."""
    source_latents: Tensor
    inverted_latents: Tensor
    graphs: dict[str, Bound]
    nbytes: int
    """Of its values and latents in memory."""

    @classmethod
    def open(cls, folder: Path, base: OnnxBase) -> OnnxEngine:
        """Opens `clips/<name>` on its base.

        Raises InputError when the clip is missing or altered, or belongs to another base.
        """
        manifest = read_json(folder / MANIFEST)
        info = ClipInfo.from_json(manifest)
        if info.exported_base != base.folder.name:
            raise InputError(f"clip {folder.name} belongs to base {info.exported_base}, not to {base.folder.name}")
        _verify(folder, manifest, ["values.safetensors", "latents.safetensors"])
        values = load_tensors(folder / "values.safetensors")
        if set(values) != set(base.value_inputs):
            raise InputError(f"clip {folder.name} tuned other parameters than base {base.folder.name} takes")
        bound = {base.value_inputs[name]: value.float() for name, value in values.items()}
        latents = load_tensors(folder / "latents.safetensors")
        return cls(
            base=base,
            info=info,
            revision=revision_of([manifest, base.revision]),
            nbytes=sum(value.nbytes for value in (*bound.values(), *latents.values())),
            source_latents=latents["source"].to(base.device),
            inverted_latents=latents["inverted"].to(base.device),
            graphs={
                name: Bound(session, base.device, bound if name == "unet" else None)
                for name, session in base.sessions.items()
            },
        )

    def extra_bytes(self, prompts: int, *, encode: bool = False) -> int:
        """Memory that an edit of so many prompts in one batch needs beyond what is held; `encode`: of other frames."""
        frames = min(FRAMES_AT_ONCE, self.info.frames)
        items = {"text_encoder": MAX_PROMPTS + 1, "unet": 2 * prompts, "vae_decoder": frames}
        pixels = self.info.frames * self.info.height * self.info.width * 3
        # The frames of all prompts as they are put together, and in the response.
        return self.base.extra_bytes(items | {"vae_encoder": frames * encode}) + 2 * prompts * pixels

    def _run(self, name: str, **inputs: Tensor) -> Tensor:
        output = self.graphs[name](**inputs)
        self.base.ran(name, output.shape[0])
        return output

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    def encode_text(self, prompts: list[str]) -> Tensor:
        return self._run("text_encoder", input_ids=self.base.tokenize(prompts))

    def encode_video(self, frames: np.ndarray) -> Tensor:
        exported = (self.info.frames, self.info.height, self.info.width, 3)
        if frames.shape != exported:
            raise InputError(f"frames are {frames.shape} (f, H, W, 3), but the clip was exported for {exported}")
        parts = to_unit(frames).split(FRAMES_AT_ONCE)
        latents = torch.cat([self._run("vae_encoder", pixels=part) for part in parts])
        return latents.transpose(0, 1)[None]  # f c h w → 1 c f h w

    def predict(self, latents: Tensor, timestep: int, text: Tensor) -> Tensor:
        timesteps = torch.full((latents.shape[0],), timestep, dtype=torch.int64)
        return self._run("unet", latents=latents, timestep=timesteps, text=text)

    def decode(self, latents: Tensor) -> np.ndarray:
        images = latents.transpose(1, 2).flatten(0, 1)  # (b f) c h w
        parts = [to_frames(self._run("vae_decoder", latents=part)) for part in images.split(FRAMES_AT_ONCE)]
        frames = np.concatenate(parts)
        return frames.reshape(latents.shape[0], -1, *frames.shape[1:])


def find_clip(repository: Path, name: str) -> tuple[Path, Path]:
    """The folders of an exported clip and of its base; raises InputError, naming those there are, for another name."""
    folder = repository / STREAM_MODEL / str(VERSION)
    clip = folder / "clips" / check_clip_name(name)
    if not clip.is_dir():
        known = sorted(path.parent.name for path in folder.glob(f"clips/*/{MANIFEST}"))
        raise InputError(f"clip {name!r} is not in {repository}: {', '.join(known) or 'no clip is'}")
    return clip, folder / "base" / ClipInfo.from_json(read_json(clip / MANIFEST)).exported_base


def open_clip(repository: Path, name: str, *, threads: int | None = None) -> OnnxEngine:
    """Opens an exported clip of a model repository, and its base.

    Raises InputError as find_clip, OnnxBase.open and OnnxEngine.open do.
    """
    clip, base = find_clip(repository, name)
    return OnnxEngine.open(clip, OnnxBase.open(base, threads=threads))


def _verify(folder: Path, manifest: dict[str, Any], needed: list[str]) -> None:
    hashes = manifest.get("files", {})
    for name in sorted({*needed, *hashes}):
        if not (folder / name).is_file() or sha256(folder / name) != hashes.get(name):
            raise InputError(f"{folder / name} is missing or altered: remove {folder} and export again")
