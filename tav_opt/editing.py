"""The edit itself, V* = D(DDIM-sample(DDIM-invert(E(V)), T*)) (paper section 3.3, equation 5), over any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from torch import Tensor

from tav_opt import ddim, inversion
from tav_opt.conditions import condition
from tav_opt.conditions.condition import Condition, Conditioned
from tav_opt.config import EditConfig, InputError, OnProgress, SolverName, check_numbers, check_text
from tav_opt.solvers import solver

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
    if config.control_inversion:
        _check_control_inversion(config)


def _check_control_inversion(config: EditConfig) -> None:
    if not config.controls or not config.inversion:
        raise InputError("control inversion would change nothing: there is no control, or no inversion")
    for one in config.controls:
        if (one.start, one.end) != (0, 1):
            raise InputError(
                f"control {one.name}: a window of steps, {one.start:g}…{one.end:g}, with control inversion"
            )


def conditions(engine: Engine, config: EditConfig, maps: Mapping[str, np.ndarray]) -> list[Condition]:
    """What the edit follows: uint8 `maps` (f, H, W, 3) by the names of its controls, seen by the engine's networks.

    Raises InputError for controls, networks and maps that do not belong together.
    """
    info = engine.info
    if not config.controls and not maps:
        return []
    shape = (info.frames, info.height, info.width, 3)
    return condition.conditions(engine.networks, config.controls, maps, shape, engine.source_latents.device)


def start_latents(
    engine: Engine,
    config: EditConfig,
    frames: np.ndarray | None = None,
    on_step: ddim.OnStep = lambda _: None,
    *,
    following: Sequence[Condition] = (),
    on_call: Callable[[], object] = lambda: None,
) -> Tensor:
    """The latents (1, c, f, h, w) that sampling starts from.

    The clip's own inverted latents where its inversion is the one asked for; inverted anew for another or for `frames`
    uint8 (f, H, W, 3); seeded noise without inversion. `on_call` is called before each call of the network.
    """
    if not config.inversion:
        noise = torch.randn(engine.source_latents.shape, generator=torch.Generator().manual_seed(config.seed))
        return noise.to(engine.source_latents)
    asked = engine.info.inversion_of(config)
    if frames is None and asked.key == engine.info.inversion.key and not config.control_inversion:
        return engine.inverted_latents
    predict = condition.always(engine.predict, following) if config.control_inversion else engine.predict
    source = engine.source_latents if frames is None else engine.encode_video(frames)
    empty = engine.encode_text([""])
    return inversion.invert(predict, source, empty, engine.schedule, asked, on_step=on_step, on_call=on_call)


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
    following: Sequence[Condition] = (),
    on_step: ddim.OnStep = lambda _: None,
) -> Iterator[Tensor]:
    """The sampled latents (b, c, f, h, w) of the prompts, `at_once` of them in one batch, batch after batch.

    `text` is of `encode_prompts`, `start` of `start_latents`. The steps that `on_step` is told of are counted over all
    batches.
    """
    batches = text[1:].split(at_once)
    total = config.steps * len(batches)
    for done, batch in zip(range(0, total, config.steps), batches, strict=True):
        yield ddim.sample(
            Conditioned(engine.predict, following, config.steps) if following else engine.predict,
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
    maps: Mapping[str, np.ndarray] = MappingProxyType({}),
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """Edits the engine's clip, or `frames` uint8 (f, H, W, 3) in its place → uint8 (prompts, f, H, W, 3) RGB.

    `maps` uint8 (f, H, W, 3), by name, are what the edit's controls follow, by the engine's networks.
    Prompts alone stand for EditConfig(prompts=…). One prompt after the other: memory stays that of one guided edit.
    Raises InputError for impossible settings; what `on_progress` raises, such as ddim.Stopped, ends the edit.
    """
    config = edit if isinstance(edit, EditConfig) else engine.info.edited(EditConfig.of(edit))
    check(config)
    following = conditions(engine, config, maps)
    text = encode_prompts(engine, config)

    def told(step: ddim.Step) -> None:
        if on_progress is not None:
            on_progress(step.stage, step.number, step.total)

    start = start_latents(engine, config, frames, told, following=following)
    sampled = sample(engine, config, text, start, following=following, on_step=told)
    return np.concatenate([engine.decode(latents) for latents in sampled])
