"""An engine that only counts, and an editor on it, for what needs no server."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tav_opt import ddim
from tav_opt.config import EditConfig, InputError
from tav_opt.contract import ClipInfo
from tav_opt.memory.promises import Memory
from tav_opt.serving import decoding
from tav_opt.serving.edits import Editor
from tav_opt.serving.inversions import Inversions
from tav_opt.serving.report import Report

SHORT = EditConfig(prompts=("a panda is skiing",), steps=3, guidance_scale=7.5)
LONG = replace(SHORT, steps=1000)
GIB = 1 << 30


class FakeEngine:
    """Counts its steps and the prompts of each; every prompt of a batch is said to need a GiB."""

    info = ClipInfo(base="", base_hash="0" * 64, prompt="", frames=2, height=8, width=8, fps=8, inversion_steps=7)
    schedule = ddim.Schedule.from_config({})
    source_latents = inverted_latents = torch.zeros(1, 4, 2, 2, 2)
    revision = "r1"
    kind = "onnxruntime"
    frames_at_once = 4
    sound = source = None

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.encoded: list[np.ndarray] = []

    def encode_text(self, prompts):
        return torch.zeros(len(prompts), 3, 2)

    def encode_video(self, frames):
        self.encoded.append(frames)
        return torch.full((1, 4, len(frames), 2, 2), float(frames.mean()))

    def check_told(self, _told):
        raise InputError("no such UNet")

    def predict(self, latents, timestep, text):
        self.batches.append(latents.shape[0])
        return torch.zeros_like(latents)

    def decode(self, latents, on_part=lambda: None):
        on_part()
        return np.zeros((latents.shape[0], latents.shape[2], 8, 8, 3), np.uint8)

    def extra_bytes(self, prompts, *, encode=False, windows=1, told=("text",), controls=(), frames=0):
        return prompts * windows * GIB


def frames_like(engine, seed: int) -> np.ndarray:
    info = engine.info
    return np.random.default_rng(seed).integers(0, 256, (info.frames, info.height, info.width, 3), dtype=np.uint8)


def nothing() -> None:
    pass


def editor(engine, **changes) -> Editor:
    given = {
        "clips": lambda _name: engine,
        "inversions": Inversions(memory_limit=GIB),
        "decode": lambda data, wanted, go_on: decoding.frames_of(data, wanted),
        "memory": Memory(lambda: 100 * GIB),
    }
    return Editor(**given | changes)


def answered(editor_: Editor, tensors, go_on=nothing):
    """All responses, the last one too, and the report."""
    sent, report = [], Report()
    last = editor_.answer(tensors, sent.append, go_on, report)
    return [*sent, last], report


def told(responses):
    return [(a["stage"][0].decode(), int(a["step"][0]), int(a["steps"][0])) for a in responses]


class Stop:
    """Raises at the n-th call."""

    def __init__(self, after: int, error: Exception) -> None:
        self.left, self.error = after, error

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error
