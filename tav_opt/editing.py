"""The edit itself, V* = D(DDIM-sample(DDIM-invert(E(V)), T*)) (paper section 3.3, equation 5), over any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from torch import Tensor

from tav_opt import ddim, inversion
from tav_opt.blending import Blend
from tav_opt.config import EditConfig, InputError, OnProgress, PathLike, SolverName, check_numbers, check_text
from tav_opt.solvers import solver
from tav_opt.video import masks
from tav_opt.windows import windowed

if TYPE_CHECKING:
    from tav_opt.engines import Engine


def check(config: EditConfig) -> None:
    """Raises InputError for settings that no engine can follow, naming the value."""
    if not config.prompts:
        raise InputError("no prompt: give at least one")
    for prompt in config.prompts:
        if not prompt.strip():
            raise InputError("prompt '' is empty: say what the edit shall show")
        check_text("prompt", prompt)
    check_text("negative prompt", config.negative_prompt)
    check_numbers(config)
    if config.solver not in get_args(SolverName):
        raise InputError(f"solver {config.solver[:63]!r} is not {', '.join(get_args(SolverName))}")
    if config.solver != "ddim" and config.eta > 0:
        raise InputError(f"eta {config.eta:g} with solver {config.solver}: only ddim adds noise")


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How an edit calls the network, whose frames may be fewer than the edit's."""

    windows_at_once: int = 1
    """Windows of a long clip in one call."""
    on_call: Callable[[], object] = lambda: None
    """Called before each; what it raises goes through."""

    def predict(self, engine: Engine) -> ddim.Predict:
        """The engine's `predict` for latents (b, c, f, h, w) of as many frames as it takes, or more."""

        def asked(latents: Tensor, timestep: ddim.Timestep, text: Tensor) -> Tensor:
            self.on_call()
            return engine.predict(latents, timestep, text)

        return windowed(asked, engine.info.network_frames, at_once=self.windows_at_once)


def start_latents(
    engine: Engine,
    config: EditConfig,
    source: Tensor | None = None,
    on_step: ddim.OnStep = lambda _: None,
    *,
    calls: Calls = Calls(),
) -> Tensor:
    """The latents (1, c, f, h, w) that sampling starts from.

    The clip's own inverted latents where its inversion is the one asked for; inverted anew for another or for another
    `source` (1, c, f, h, w); seeded noise without inversion. Raises InputError for fewer frames than the network takes.
    """
    if not config.inversion:
        like = engine.source_latents if source is None else source
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(config.seed)).to(like)
    asked = engine.info.inversion_of(config)
    if source is None and asked.key == engine.info.inversion.key:
        return engine.inverted_latents
    source = engine.source_latents if source is None else source
    empty = engine.encode_text([""])
    return inversion.invert(calls.predict(engine), source, empty, engine.schedule, asked, on_step=on_step)


def blend(engine: Engine, config: EditConfig, mask: np.ndarray, source: Tensor, start: Tensor) -> Blend:
    """What keeps a source outside a mask bool (1 or f, H, W), while sampling goes on from `start`.

    `source` and `start` are (1, c, f, h, w). Raises InputError for a mask of another size, or without white.
    """
    return Blend.of(mask, source, start, engine.schedule.alpha(engine.schedule.timesteps(config.steps)[0]))


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
    blend: ddim.Blend | None = None,
    calls: Calls = Calls(),
    on_step: ddim.OnStep = lambda _: None,
) -> Iterator[Tensor]:
    """The sampled latents (b, c, f, h, w) of the prompts, `at_once` of them in one batch, batch after batch.

    `text` is of `encode_prompts`, `start` of `start_latents`, `blend` of the function of that name. The steps that
    `on_step` is told of are counted over all batches.
    """
    batches = text[1:].split(at_once)
    total = config.steps * len(batches)
    for done, batch in zip(range(0, total, config.steps), batches, strict=True):
        yield ddim.sample(
            calls.predict(engine),
            start.expand(len(batch), -1, -1, -1, -1),
            batch,
            engine.schedule,
            config.steps,
            unconditional=text[:1].expand(len(batch), -1, -1),
            guidance_scale=config.guidance_scale,
            guidance_interval=config.guidance_interval,
            solver=solver(config.solver, config.steps),
            eta=config.eta,
            generator=torch.Generator().manual_seed(config.seed),
            blend=blend,
            on_step=_counted(on_step, done, total),
        )


def _counted(on_step: ddim.OnStep, done: int, total: int) -> ddim.OnStep:
    """One batch's steps among those of all."""
    return lambda step: on_step(replace(step, number=done + step.number, total=total))


def edit(
    engine: Engine,
    edit: EditConfig | str | Iterable[str],
    *,
    frames: np.ndarray | None = None,
    mask: np.ndarray | PathLike | None = None,
    windows_at_once: int = 1,
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """Edits the engine's clip, or `frames` uint8 (f, H, W, 3) in its place → uint8 (prompts, f, H, W, 3) RGB.

    Prompts alone stand for EditConfig(prompts=…). One prompt after the other: memory stays that of one guided edit, and
    of a clip longer than the network takes that of so many windows at once. A `mask`, bool (1 or f, H, W) or a file as
    `video.masks.of_edit` reads it, is true where the picture may change. Raises InputError for impossible settings;
    what `on_progress` raises, such as ddim.Stopped, ends the edit.
    """
    config = edit if isinstance(edit, EditConfig) else engine.info.edited(EditConfig.of(edit))
    check(config)
    info, calls = engine.info, Calls(windows_at_once=windows_at_once)
    if mask is not None and not isinstance(mask, np.ndarray):
        count = info.frames if frames is None else len(frames)
        mask = masks.of_edit(mask, engine.source, count, info.height, info.width)
    text = encode_prompts(engine, config)

    def told(step: ddim.Step) -> None:
        if on_progress is not None:
            on_progress(step.stage, step.number, step.total)

    source = None if frames is None else engine.encode_video(frames)
    start = start_latents(engine, config, source, told, calls=calls)
    source = engine.source_latents if source is None else source
    kept = None if mask is None else blend(engine, config, mask, source, start)
    sampled = sample(engine, config, text, start, blend=kept, calls=calls, on_step=told)
    return np.concatenate([engine.decode(latents) for latents in sampled])
