"""The edit itself, V* = D(DDIM-sample(DDIM-invert(E(V)), T*)) (paper section 3.3, equation 5), over any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tav_opt import ddim
from tav_opt.config import EditConfig, InputError

if TYPE_CHECKING:
    from tav_opt.engines import Engine

OnProgress = Callable[[str, int, int], bool | None]
"""Called with the stage (invert or sample), its steps done and its steps; returning False stops the edit."""

OnClean = Callable[[int, int, Tensor], None]
"""Called before OnProgress in sampling with the number of the batch's first prompt, the step, and the clean latents
(b, c, f, h, w) that it predicts."""


def check(config: EditConfig) -> None:
    """Raises InputError for settings that no engine can follow, naming the value."""
    if not config.prompts:
        raise InputError("no prompt: give at least one")
    for prompt in config.prompts:
        if not prompt.strip():
            raise InputError("prompt '' is empty: say what the edit shall show")
    for name, value, low, high in (
        ("steps", config.steps, 1, 1000),
        ("inversion steps", 1 if config.inversion_steps is None else config.inversion_steps, 1, 1000),
        ("guidance scale", config.guidance_scale, 0, 100),
        ("eta", config.eta, 0, 1),
        ("seed", config.seed, 0, 2**63 - 1),
    ):
        if not low <= value <= high:  # false for NaN too
            raise InputError(f"{name} {value} is not within {low}…{high}")


def start_latents(
    engine: Engine, config: EditConfig, frames: np.ndarray | None = None, on_progress: OnProgress | None = None
) -> Tensor:
    """The latents (1, c, f, h, w) that sampling starts from.

    The clip's own inverted latents where its steps are those asked for; inverted anew for other steps or for `frames`
    uint8 (f, H, W, 3); seeded noise without inversion.
    """
    if not config.inversion:
        noise = torch.randn(engine.source_latents.shape, generator=torch.Generator().manual_seed(config.seed))
        return noise.to(engine.source_latents)
    steps = engine.info.inversion_steps if config.inversion_steps is None else config.inversion_steps
    if frames is None and steps == engine.info.inversion_steps:
        return engine.inverted_latents
    source = engine.source_latents if frames is None else engine.encode_video(frames)
    return ddim.invert(
        engine.predict,
        source,
        engine.encode_text([""]),
        engine.schedule,
        steps,
        on_step=_steps_of("invert", steps, on_progress),
    )


def encode_prompts(engine: Engine, config: EditConfig) -> Tensor:
    """→ (1 + prompts, tokens, width), the negative prompt first; raises InputError for prompts that are too long."""
    return engine.encode_text([config.negative_prompt, *config.prompts])


def sample(
    engine: Engine,
    config: EditConfig,
    text: Tensor,
    start: Tensor,
    *,
    at_once: int = 1,
    on_progress: OnProgress | None = None,
    on_clean: OnClean | None = None,
) -> Iterator[Tensor]:
    """The sampled latents (b, c, f, h, w) of the prompts, `at_once` of them in one batch, batch after batch.

    `text` is of `encode_prompts`, `start` of `start_latents`. Raises ddim.Stopped when `on_progress` returns False.
    """
    batches = text[1:].split(at_once)
    total = config.steps * len(batches)
    for number, batch in enumerate(batches):
        yield ddim.sample(
            engine.predict,
            start.expand(len(batch), -1, -1, -1, -1),
            batch,
            engine.schedule,
            config.steps,
            unconditional=text[:1].expand(len(batch), -1, -1),
            guidance_scale=config.guidance_scale,
            eta=config.eta,
            generator=torch.Generator().manual_seed(config.seed),
            on_step=_steps_of("sample", total, on_progress, done=number * config.steps),
            on_clean=None if on_clean is None else partial(on_clean, number * at_once),
        )


def edit(
    engine: Engine, config: EditConfig, *, frames: np.ndarray | None = None, on_progress: OnProgress | None = None
) -> np.ndarray:
    """Edits the engine's clip, or `frames` uint8 (f, H, W, 3) in its place → uint8 (prompts, f, H, W, 3) RGB.

    One prompt after the other: memory stays that of one guided edit. Raises InputError for impossible settings and
    ddim.Stopped when `on_progress` returns False.
    """
    check(config)
    text = encode_prompts(engine, config)
    start = start_latents(engine, config, frames, on_progress)
    sampled = sample(engine, config, text, start, on_progress=on_progress)
    return np.concatenate([engine.decode(latents) for latents in sampled])


def _steps_of(stage: str, total: int, on_progress: OnProgress | None, done: int = 0) -> ddim.OnStep | None:
    if on_progress is None:
        return None
    return lambda step, _latents: on_progress(stage, done + step, total)
