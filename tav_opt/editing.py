"""The edit itself, V* = D(DDIM-sample(DDIM-invert(E(V)), T*)) (paper section 3.3, equation 5), over any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from tav_opt import blending, ddim, inversion
from tav_opt.conditions import condition, token_map
from tav_opt.conditions.attention_control import CONTROL
from tav_opt.conditions.condition import Condition, Conditioned
from tav_opt.conditions.source_row import Beside, BlendBy, Kept, Sampled, Words
from tav_opt.conditions.token_map import Prompt
from tav_opt.config import KEEP, EditConfig, InputError, OnProgress, PathLike, SolverName, check_numbers, check_text
from tav_opt.reuse import FEATURES, Reused
from tav_opt.solvers import solver
from tav_opt.video import masks
from tav_opt.windows import windowed

if TYPE_CHECKING:
    from tav_opt.engines import Engine

T = TypeVar("T")


def check(config: EditConfig, *, complete: bool = True) -> None:
    """Raises InputError for settings that no engine can follow, naming the value.

    Before the clip and a preset have filled in what was not given, `complete` is false: whether settings go together is
    not known then.
    """
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
    _check_control(config)
    _check_following(config)
    if complete:
        _check_together(config)
        _check_reuse(config)


def _check_reuse(config: EditConfig) -> None:
    if config.reuse_interval == 1:
        return
    others = ("attention control", config.controlled), ("controls", config.controls)
    for name, given in others:
        if given:
            raise InputError(
                f"reuse interval {config.reuse_interval} with {name}: features are kept of the plain network alone; "
                "must be 1"
            )


def _check_control(config: EditConfig) -> None:
    if config.keep is not None and config.keep not in KEEP:
        raise InputError(f"keep {config.keep[:63]!r} is not {' or '.join(KEEP)}")
    for text in filter(None, (config.source_prompt, *config.blend_words, *config.word_weights)):
        check_text("source prompt or word", text)
    if config.source_prompt is not None and not config.source_prompt.strip():
        raise InputError("source prompt '' is empty: say what the source shows, or leave it out for the clip's caption")
    for given in config.word_weights:
        token_map.weight_of(given)
    filled = config.filled()
    if not config.beside and (config.source_prompt is not None or filled.direct_inversion):
        name = "direct inversion" if filled.direct_inversion else "source prompt"
        raise InputError(f"{name} would change nothing: nothing of the source is replaced or blended")
    if config.blends and config.eta > 0:
        raise InputError(
            f"eta {config.eta:g} with blend words: what stays as it is has no noise of its own; eta must be 0"
        )


def _check_following(config: EditConfig) -> None:
    if config.controls and config.controlled:
        raise InputError(
            f"control {config.controls[0].name!r} with attention control (keep, replace, blend words, word weights): "
            "no network is exported for both; give one of them"
        )
    for one in config.controls if config.control_inversion else ():
        if (one.start, one.end) != (0, 1):
            raise InputError(
                f"control {one.name}: a window of steps, {one.start:g}…{one.end:g}, with control inversion"
            )


def _check_together(config: EditConfig) -> None:
    if config.solver != "ddim" and config.eta > 0:
        raise InputError(f"eta {config.eta:g} with solver {config.solver}: only ddim adds noise")
    direct = config.filled().direct_inversion
    if direct and not config.inversion:
        raise InputError("direct inversion without inversion: there is no trajectory to go back to")
    if direct and config.inversion_steps not in (None, config.steps):
        raise InputError(
            f"inversion steps {config.inversion_steps} with direct inversion: must be as many as steps, {config.steps}"
        )
    if config.control_inversion and not (config.controls and config.inversion):
        raise InputError("control inversion would change nothing: there is no control, or no inversion")


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How an edit calls the network, whose frames may be fewer than the edit's."""

    windows_at_once: int = 1
    """Windows of a long clip in one call."""
    on_call: Callable[[], object] = lambda: None
    """Called before each; what it raises goes through."""

    def predict(self, engine: Engine) -> ddim.Predict:
        """The engine's `predict` for latents (b, c, f, h, w) of as many frames as it takes, or more."""
        return self._windowed(engine, self._told(engine.predict))

    def reusing(self, engine: Engine, interval: int, steps: int) -> ddim.Predict:
        """The same for one run of so many steps, with features that are computed every so manieth step."""
        if interval == 1:
            return self.predict(engine)
        reused = Reused(self._told(engine.predict), self._told(engine.predict_with_features), interval, steps)
        return reused.stepwise(self._windowed(engine, reused))

    def _told(self, ask: Callable[[Tensor, ddim.Timestep, Any], T]) -> Callable[[Tensor, ddim.Timestep, Any], T]:
        def asked(latents: Tensor, timestep: ddim.Timestep, text: Any) -> T:
            self.on_call()
            return ask(latents, timestep, text)

        return asked

    def _windowed(self, engine: Engine, predict: ddim.Predict) -> ddim.Predict:
        return windowed(predict, engine.info.network_frames, at_once=self.windows_at_once)


def conditions(
    engine: Engine, config: EditConfig, maps: Mapping[str, np.ndarray], frames: int | None = None
) -> list[Condition]:
    """What the edit follows: uint8 `maps` (f, H, W, 3) by the names of its controls, seen by the engine's networks.

    `frames` are those of another source than the clip. Raises InputError for controls, networks and maps that do not
    belong together.
    """
    info = engine.info
    if not config.controls and not maps:
        return []
    shape = (info.frames if frames is None else frames, info.height, info.width, 3)
    return condition.conditions(engine.networks, config.controls, maps, shape, engine.source_latents.device)


def start_latents(
    engine: Engine,
    config: EditConfig,
    source: Tensor | None = None,
    on_step: ddim.OnStep = lambda _: None,
    *,
    following: Sequence[Condition] = (),
    calls: Calls = Calls(),
) -> Tensor:
    """The latents (1, c, f, h, w) that sampling starts from; with direct inversion the last of (steps + 1, …).

    The clip's own inverted latents where its inversion is the one asked for; inverted anew for another or for another
    `source` (1, c, f, h, w); seeded noise without inversion. Raises InputError for fewer frames than the network takes.
    """
    if not config.inversion:
        like = engine.source_latents if source is None else source
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(config.seed)).to(like)
    asked = engine.info.inversion_of(config)
    if source is None and asked.key == engine.info.inversion.key and not config.control_inversion:
        return engine.inverted_latents
    trajectory = [engine.source_latents if source is None else source]

    def led(step: ddim.Step) -> None:
        if asked.trajectory:
            trajectory.append(step.latents)
        on_step(step)

    predict, empty = calls.predict(engine), engine.encode_text([""])
    predict = condition.always(predict, following) if config.control_inversion else predict
    found = inversion.invert(predict, trajectory[0], empty, engine.schedule, asked, on_step=led)
    return torch.cat(trajectory) if asked.trajectory else found


def blend(engine: Engine, config: EditConfig, mask: np.ndarray, source: Tensor, start: Tensor) -> blending.Blend:
    """What keeps a source outside a mask bool (1 or f, H, W), while sampling goes on from `start`.

    `source` is (1, c, f, h, w), `start` of `start_latents`. Raises InputError for a mask of another size, or without
    white.
    """
    alpha = engine.schedule.alpha(engine.schedule.timesteps(config.steps)[0])
    return blending.Blend.of(mask, source, start[-1:], alpha)


def check_engine(engine: Engine, config: EditConfig) -> None:
    """Raises InputError for what an engine has no graph for, saying how it gets one."""
    asked = {
        "attention control": ("--attention-control", CONTROL if config.controlled else ()),
        "reuse interval": ("--feature-reuse", (FEATURES,) if config.reuse_interval > 1 else ()),
    }
    for name, (option, told) in asked.items():
        try:
            if told:
                engine.check_told(("text", *told))
        except InputError as error:
            raise InputError(f"{error}: {name} needs `python -m tav_opt.export … {option}`") from None


def encode_prompts(engine: Engine, config: EditConfig) -> Tensor:
    """→ (1 + prompts, tokens, width), the negative prompt first, and where attention is controlled the source's last.

    Raises InputError for prompts that are too long, and for words of attention control that they do not have.
    """
    check_engine(engine, config)
    if not config.controlled:
        return engine.encode_text([config.negative_prompt, *config.prompts])
    source = _source_prompt(engine, config)
    text = engine.encode_text([config.negative_prompt, *config.prompts, source])
    known, *edits = (Prompt.of(engine.tokenizer, prompt, text.shape[1]) for prompt in (source, *config.prompts))
    token_map.check_names(config.blend_words, [known, *edits], "blend word")
    token_map.check_names([token_map.weight_of(given)[0] for given in config.word_weights], edits, "weighted word")
    for edit in edits:
        token_map.blend_words(known, edit, config.blend_words)
    return text


def _source_prompt(engine: Engine, config: EditConfig) -> str:
    return engine.info.prompt if config.source_prompt is None else config.source_prompt


def _beside(
    engine: Engine, predict: ddim.Predict, config: EditConfig, prompt: str, source_text: Tensor, start: Tensor
) -> Beside:
    """The network with the source beside the edit of one prompt; source_text (1, tokens, width)."""
    tokens, filled = source_text.shape[1], config.filled()
    known, edit = (Prompt.of(engine.tokenizer, text, tokens) for text in (_source_prompt(engine, config), prompt))
    before, after = token_map.blend_words(known, edit, config.blend_words)
    weights = token_map.word_weights(edit, config.word_weights)
    words = Words(
        source_text=source_text,
        token_map=token_map.token_map(known, edit),
        weights=weights,
        source_blend=before,
        edit_blend=after,
        same=known.words == edit.words and bool((weights == 1).all()),
    )
    source = Kept(start) if filled.direct_inversion else Sampled(start, engine.schedule, config.steps)
    shares = {"replace_cross": filled.replace_cross or 0.0, "replace_self": filled.replace_self or 0.0}
    blend: BlendBy | None = "words" if config.blend_words else "changes" if config.blends else None
    return Beside(predict, source, words, engine.schedule, config.steps, blend=blend, **shares)


def sample(
    engine: Engine,
    config: EditConfig,
    text: Tensor,
    start: Tensor,
    *,
    at_once: int = 1,
    blend: ddim.Blend | None = None,
    following: Sequence[Condition] = (),
    calls: Calls = Calls(),
    on_step: ddim.OnStep = lambda _: None,
) -> Iterator[Tensor]:
    """The sampled latents (b, c, f, h, w) of the prompts, `at_once` of them in one batch, batch after batch.

    `text` is of `encode_prompts`, `start` of `start_latents`, `blend` of the function of that name. The steps that
    `on_step` is told of are counted over all batches. Where attention is controlled, a batch has one prompt, and its
    source.
    """
    batches = text[1 : 1 + len(config.prompts)].split(1 if config.controlled else at_once)
    total = config.steps * len(batches)
    for number, batch in enumerate(batches):
        predict = calls.reusing(engine, config.reuse_interval, config.steps)
        step = solver(config.solver, config.steps)
        if following:
            predict = Conditioned(predict, following, config.steps)
        if config.controlled:
            beside = _beside(engine, predict, config, config.prompts[number], text[-1:], start)
            predict, step = beside, beside.solver(step) if config.blends else step
        yield ddim.sample(
            predict,
            start[-1:].expand(len(batch), -1, -1, -1, -1),
            batch,
            engine.schedule,
            config.steps,
            unconditional=text[:1].expand(len(batch), -1, -1),
            guidance_scale=config.guidance_scale,
            guidance_interval=config.guidance_interval,
            solver=step,
            eta=config.eta,
            generator=torch.Generator().manual_seed(config.seed),
            blend=blend,
            on_step=_counted(on_step, number * config.steps, total),
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
    maps: Mapping[str, np.ndarray] = MappingProxyType({}),
    windows_at_once: int = 1,
    on_progress: OnProgress | None = None,
) -> np.ndarray:
    """Edits the engine's clip, or `frames` uint8 (f, H, W, 3) in its place → uint8 (prompts, f, H, W, 3) RGB.

    Prompts alone stand for EditConfig(prompts=…). One prompt after the other: memory stays that of one guided edit, and
    of a clip longer than the network takes that of so many windows at once. A `mask`, bool (1 or f, H, W) or a file as
    `video.masks.of_edit` reads it, is true where the picture may change; `maps`, uint8 (f, H, W, 3) by name, are what
    the edit's controls follow, by the engine's networks. Raises InputError for impossible settings; what `on_progress`
    raises, such as ddim.Stopped, ends the edit.
    """
    config = edit if isinstance(edit, EditConfig) else engine.info.edited(EditConfig.of(edit))
    check(config)
    info, calls = engine.info, Calls(windows_at_once=windows_at_once)
    count = info.frames if frames is None else len(frames)
    if mask is not None and not isinstance(mask, np.ndarray):
        mask = masks.of_edit(mask, engine.source, count, info.height, info.width)
    following = conditions(engine, config, maps, count)
    text = encode_prompts(engine, config)

    def told(step: ddim.Step) -> None:
        if on_progress is not None:
            on_progress(step.stage, step.number, step.total)

    source = None if frames is None else engine.encode_video(frames)
    start = start_latents(engine, config, source, told, following=following, calls=calls)
    source = engine.source_latents if source is None else source
    kept = None if mask is None else blend(engine, config, mask, source, start)
    sampled = sample(engine, config, text, start, blend=kept, following=following, calls=calls, on_step=told)
    return np.concatenate([engine.decode(latents) for latents in sampled])
