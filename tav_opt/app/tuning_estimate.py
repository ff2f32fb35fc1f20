"""What tuning will need, and what suits a model, told before the start from its configuration alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tav_opt.app.app_config import PACKAGES_MODEL
from tav_opt.config import InputError, TrainConfig


def estimate(model: str, train: TrainConfig, frames: int, height: int, width: int) -> tuple[str, bool]:
    """In a sentence, and whether it fits; raises InputError for a folder that holds no model."""
    if not Path(model).is_dir():
        return f"How much memory {model} needs is known once it is here.", True
    from dataclasses import replace

    from tav_opt.base.directory import Base
    from tav_opt.device import dtype_on, usable_device
    from tav_opt.memory import eager, outline
    from tav_opt.memory.free import free_bytes

    device = usable_device("auto")
    parts = outline.of(Base.at(model), dtype_on(device))
    needed = {
        on: eager.estimate_tuning(parts, replace(train, gradient_checkpointing=on), frames, height, width)
        for on in (False, True)
    }
    free, told = free_bytes(device), train.gradient_checkpointing
    asked = f"{frames} frames of {width}×{height}"
    has = f"{device.type} has {_gib(free)} free"
    if told is not True and needed[False] <= free:
        return f"Tuning {asked} needs about {_gib(needed[False])}; {has}.", True
    if told is not False and needed[True] <= free:
        return f"Tuning {asked} needs about {_gib(needed[True])}, with gradient checkpointing; {has}.", True
    least = needed[told is not False]
    return f"Tuning {asked} needs about {_gib(least)}, but {has}: take fewer frames or a smaller size.", False


SUITED = ("height", "width", "lr", "steps", "uniform")
"""What `suited` may tell."""


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


@cache
def suited(model: str) -> dict[str, Any]:
    """Settings that suit a model better than the paper's, where that is known: its size, and the small model's own."""
    if not Path(model).is_dir():
        return {}
    from tav_opt.base.directory import Base

    try:
        size = Base.at(model).native_size
    except InputError:  # it is said again when tuning begins
        return {}
    found: dict[str, Any] = {"height": size, "width": size}
    if Path(model) == PACKAGES_MODEL:
        from tav_opt.demo.run import SMALL_LR, DemoConfig

        found |= {"lr": SMALL_LR, "steps": DemoConfig.steps, "uniform": True}
    return found
