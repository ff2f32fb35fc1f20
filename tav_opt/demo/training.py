"""The loop of every training stage: resumable to the step, averaged weights, a log and a sheet to look at."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tav_opt.config import InputError
from tav_opt.files import whole

SAVE_SECONDS = 60.0
"""A kill loses at most so much."""
SHEET_SECONDS = 420.0
CPU = torch.device("cpu")
POOL = 3000
"""Pictures kept ready; to compose and encode each batch anew would double a step's time."""
FRESH = 4
"""Pictures of the pool replaced at each step."""
EMA = 0.999
WARMUP = 100
SMOOTHING = 0.99
"""Of the reported loss."""


class Stage(Protocol):
    """What a stage of training tells the loop."""

    name: str
    lr: float
    modules: nn.ModuleDict
    """What trains."""

    def loss(self, rng: np.random.Generator) -> Tensor:
        """The loss of one batch; everything random comes from `rng` and torch's seeded generator."""

    def sheet(self) -> np.ndarray:
        """A picture (H, W, 3) of how good the averaged weights are."""


@dataclass
class Progress:
    """How far a stage has come."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)


class Run:
    """One stage with its optimizer and averaged weights, kept in a folder."""

    def __init__(self, stage: Stage, folder: Path, seed: int) -> None:
        self.stage, self.folder, self.seed = stage, folder, seed
        self.progress = Progress()
        self.parameters = list(stage.modules.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=1e-2)
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        if self.state_file.is_file():
            self._load()

    @property
    def state_file(self) -> Path:
        """Where everything that resuming needs lies."""
        return self.folder / f"{self.stage.name}.pt"

    def train(self, *, minutes: float, steps: int | None = None, cool_down: bool = False) -> Progress:
        """Trains so many minutes more, or until a step; saves as it goes.

        With `cool_down` the learning rate falls evenly to zero over the minutes.

        Raises InputError when another process trains this stage in this folder: each would undo the other's work.
        """
        with self._alone():
            return self._train(minutes, steps, cool_down)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.state_file.with_suffix(".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process trains {self.stage.name} in {self.folder}: let it end") from None
            yield

    def _train(self, minutes: float, steps: int | None, cool_down: bool) -> Progress:
        start = saved = shown = time.monotonic()
        first, before = self.progress.step, self.progress.seconds
        while (now := time.monotonic()) - start < 60 * minutes and (steps is None or self.progress.step < steps):
            self._step(1 - (now - start) / (60 * minutes) if cool_down else 1.0)
            self.progress.seconds = before + time.monotonic() - start
            if now - saved > SAVE_SECONDS:
                self.save()
                saved = now
            if now - shown > SHEET_SECONDS:
                self.show()
                shown = now
        if self.progress.step > first:
            self.save()
            self.show()
        return self.progress

    def _step(self, heat: float = 1.0) -> None:
        step = self.progress.step
        torch.manual_seed(self.seed * 1_000_003 + step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.lr * heat * min(1.0, (step + 1) / WARMUP)
        loss = self.stage.loss(np.random.default_rng((self.seed, step)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - self._decay())
        value = float(loss.detach())
        self.progress.loss = value if step < 10 else SMOOTHING * self.progress.loss + (1 - SMOOTHING) * value
        self.progress.step += 1
        if self.progress.step % 100 == 0:
            self._log()

    def _decay(self) -> float:
        # Early averages would hold the random start for long.
        return min(EMA, (1 + self.progress.step) / (10 + self.progress.step))

    def _log(self) -> None:
        self.progress.curve.append((self.progress.step, round(self.progress.loss, 5)))
        line = {"stage": self.stage.name, "step": self.progress.step, "loss": round(self.progress.loss, 5)}
        print(json.dumps(line | {"seconds": round(self.progress.seconds)}), flush=True)

    def save(self) -> None:
        """Keeps weights, averages, optimizer and progress, whole or not at all."""
        state = {
            "modules": self.stage.modules.state_dict(),
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
        }
        with whole(self.state_file) as temporary:
            torch.save(state, temporary)

    def _load(self) -> None:
        state: dict[str, Any] = torch.load(self.state_file, weights_only=True, map_location=self.parameters[0].device)
        self.stage.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averages = state["averages"]
        self.progress = Progress(**state["progress"])

    def swap(self) -> None:
        """Exchanges the weights with their averages; a second call exchanges them back."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(kept)

    def show(self) -> None:
        """Writes the sheet of the averaged weights beside the state."""
        self.swap()
        self.stage.modules.eval()
        with torch.no_grad():
            picture = self.stage.sheet()
        self.stage.modules.train()
        self.swap()
        Image.fromarray(picture).save(self.folder / f"{self.stage.name}.png")


def mixed_precision(device: torch.device = CPU) -> torch.autocast:
    """bfloat16 on GPUs, and on processors that multiply tiles of it; on others it was 1.4 times slower than float32."""
    enabled = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 pictures (n, H, W, 3), n a multiple of `columns` → one picture (rows·H, columns·W, 3)."""
    return np.concatenate([np.concatenate(list(row), 1) for row in images.reshape(-1, columns, *images.shape[1:])])


def to_unit(images: np.ndarray) -> Tensor:
    """uint8 (n, H, W, 3) → (n, 3, H, W) in −1…1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """(n, 3, H, W) in −1…1 → uint8 (n, H, W, 3)."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
