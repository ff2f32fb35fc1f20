"""A training run on disk: a folder of its own, states to go on from, previews; what is trained is the caller's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tav_opt import ddim, tuning_state
from tav_opt.command import Interrupted
from tav_opt.config import InputError, OptimiserConfig, check_numbers, check_text
from tav_opt.tuning_step import Training, restore, state_of

PASSING = ("preview_every", "preview_prompts", "save_every", "keep_state")
"""Settings that the resulting weights do not depend on: a stopped run may go on under others."""
Stop = Callable[[], bool]
"""Whether the run has been asked to end."""


def check(config: OptimiserConfig, prompt: str, shows: str) -> None:
    """Raises InputError for settings that no run can follow, naming the value; `shows`: what the prompt is of."""
    if not prompt.strip():
        raise InputError(f"prompt '' is empty: say what {shows}")
    for text in (prompt, *config.preview_prompts):
        check_text("prompt", text)
    check_numbers(config)
    if config.warmup > config.steps:
        raise InputError(f"warmup {config.warmup} is more than the {config.steps} steps")
    if config.preview_every and not config.preview_prompts:
        raise InputError(f"preview_every {config.preview_every} needs preview_prompts")


@contextmanager
def running(out: Path) -> Iterator[None]:
    """A run in a folder that is its own, computed the same each time; an interruption tells what it has kept."""
    with tuning_state.claim(out), _resumable(out), deterministic():
        yield


@contextmanager
def deterministic() -> Iterator[None]:
    """On CUDA some operators add in no fixed order unless told to, or have no other way: an error; on CPU ours all do.

    cuBLAS reads its variable when it starts, with the first product on a GPU; what the user has set stays.
    """
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, settings.fill_uninitialized_memory = (
        settings.fill_uninitialized_memory,
        False,
    )  # one more write of everything
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Adds to an interruption what the run has kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if (steps := tuning_state.saved_steps(out)) is None:
            raise
        number = stop.number if isinstance(stop, Interrupted) else signal.SIGINT
        text = f"interrupted: {out} keeps the state after step {steps}, from which the same command goes on"
        raise Interrupted(number, text) from None


def resume(
    training: Training, out: Path, settings: dict[str, Any], config: OptimiserConfig, finished_steps: int | None
) -> bool:
    """Puts the folder's state, if there is one, into a training that has just begun → whether the run has ended.

    `finished_steps` are those of the result that lies there, if one does. Raises InputError for the state of a run
    with other settings, and for a run that cannot go on.
    """
    if state := tuning_state.load(out, settings, free=_free(config)):
        restore(training, *state)
    finished = finished_steps == config.steps
    if training.step > config.steps or (finished and state and state[1].get("kept")):
        raise InputError(f"{out} holds a run of {training.step} steps: give more --steps, or choose another --out")
    return finished


def check_state(out: Path, settings: dict[str, Any], config: OptimiserConfig) -> None:
    """Raises InputError for the state of a run with other settings: said before the work that comes before a step."""
    tuning_state.check(out, settings, free=_free(config))


def _free(config: OptimiserConfig) -> tuple[str, ...]:
    """With a constant rate no step depends on how many follow."""
    return ("steps",) if config.schedule == "constant" else ()


def train(
    training: Training,
    config: OptimiserConfig,
    out: Path,
    settings: dict[str, Any],
    one_step: Callable[[], float],
    on_step: Callable[[int, float], object],
    preview: Callable[[int, Stop], object],
) -> None:
    """The remaining steps, with states and previews on the way; the last state is that of the last step."""
    saved = training.step

    def save() -> None:
        nonlocal saved
        tensors, extra = state_of(training)
        tuning_state.save(out, tensors, extra | {"kept": config.keep_state}, settings)
        saved = training.step

    with tuning_state.interruptible() as interrupted:
        while training.step < config.steps and not interrupted():
            loss = one_step()
            step = training.step
            if step % config.save_every == 0 or step == config.steps:
                save()
            on_step(step, loss)
            if config.preview_every and step % config.preview_every == 0:
                with suppress(ddim.Stopped):
                    preview(step, interrupted)
        if saved < training.step:
            save()
