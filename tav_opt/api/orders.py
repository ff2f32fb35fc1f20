"""What a request asks of the server: the clip, the edit, and how its source is fitted; wrong ones are refused here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from tav_opt.api.asked_fields import CHOOSING, SOURCE, files, frames, settings
from tav_opt.client import Options
from tav_opt.config import FILLED_IN, PRESETS, ClipConfig, EditConfig, InputError, check_numbers
from tav_opt.contract import ServedClip, check_clip_name, from_tensors, to_tensors

PRESET_SIGN = "@"
"""Between a clip and a preset in a model's name."""
Kind = Literal["videos", "edits"]


class UnknownModel(InputError):
    """No clip of that name is served."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """An edit, as `AsyncClient.stream` takes it but for its files."""

    clip: str
    edit: EditConfig
    options: Options
    choice: Mapping[str, Any]
    """Which frames of a source are taken, as `video.read` has it."""


def model_of(asked: Mapping[str, Any], clips: Mapping[str, ServedClip]) -> str:
    """The model that is asked for, or the only one there is; raises UnknownModel, naming those there are."""
    names = ", ".join(clips) or "none"
    if (model := asked.get("model")) is None:
        if len(clips) == 1:
            return next(iter(clips))
        raise UnknownModel(f"model is missing; exported are: {names}")
    if model.partition(PRESET_SIGN)[0] not in clips:
        raise UnknownModel(f"model {model[:63]!r} is unknown; exported are: {names}")
    return str(model)


def order_of(asked: Mapping[str, Any], clip: ServedClip) -> Order:
    """What a request with its `model` asks for; raises InputError for what the contract or the clip does not have."""
    asked = {name: value for name, value in asked.items() if value is not None}
    name, sign, preset = asked["model"].partition(PRESET_SIGN)
    given = {tensor.name: asked[tensor.name] for tensor in settings() if tensor.name in asked}
    _put(given, "preset", preset if sign else None, f"model {asked['model']}")
    _put(given, "steps", asked.get("num_inference_steps"), "num_inference_steps")
    own = {field.name for field in fields(EditConfig)}
    several = {n: tuple(v) for n, v in given.items() if isinstance(v, list | tuple)}  # lists where they come of JSON
    edit = EditConfig(prompts=(asked["prompt"],), **{n: v for n, v in (given | several).items() if n in own})
    check_numbers(edit)
    options = {n: [*v] if n in several else v for n, v in given.items() if n not in own and n not in files()}
    left_out = frozenset(FILLED_IN) - set(given)
    order = Order(
        clip=check_clip_name(name),
        edit=edit,
        options=cast(Options, options | {"output": "mp4", "left_out": left_out}),
        choice={name: asked.get(name, getattr(ClipConfig, name)) for name in CHOOSING},
    )
    _check_clip(asked, clip)
    _check_source(asked)
    _check_wire(order, {field for field in files() - frames() if field in asked}, _source(asked) is not None)
    return order


def expected_steps(order: Order) -> int:
    """Of sampling, as far as that is known here: a clip may bring other ones."""
    if "steps" not in order.options["left_out"]:
        return order.edit.steps
    return int(PRESETS[order.options.get("preset", "exact")].get("steps", EditConfig.steps))


def seconds_of(clip: ServedClip, asked: Mapping[str, Any]) -> str:
    """How long a clip's edit is, as OpenAI has it: a text."""
    return f"{round(clip.frames / (asked.get('fps') or clip.fps), 3):g}"


def size_of(clip: ServedClip) -> str:
    """Width and height, as OpenAI has them."""
    return f"{clip.width}x{clip.height}"


def _source(asked: Mapping[str, Any]) -> Any:
    return asked.get(SOURCE) or asked.get("video")


def _put(given: dict[str, Any], name: str, value: Any, where: str) -> None:
    """A setting that has another name too; raises InputError where both stand."""
    if value is None:
        return
    if name in given:
        raise InputError(f"{where} and {name} {given[name]}: give one of them")
    given[name] = value


def _check_clip(asked: Mapping[str, Any], clip: ServedClip) -> None:
    """Raises InputError for another length or size than the clip's."""
    has = f"clip {asked['model']} has"
    if (seconds := asked.get("seconds")) is not None and not _same(seconds, seconds_of(clip, asked)):
        raise InputError(f"seconds {str(seconds)[:20]}: {has} {seconds_of(clip, asked)}")
    if asked.get("size", size_of(clip)) != size_of(clip):
        raise InputError(f"size {asked['size'][:20]}: {has} {size_of(clip)}")
    if asked.get("num_frames", clip.frames) != clip.frames:
        raise InputError(f"num_frames {asked['num_frames']}: {has} {clip.frames}")


def _same(given: str | float, seconds: str) -> bool:
    try:
        return round(float(given), 1) == round(float(seconds), 1)
    except (OverflowError, ValueError):
        return False


def _check_source(asked: Mapping[str, Any]) -> None:
    given = [name for name in CHOOSING if name in asked]
    if given and not isinstance(_source(asked), str):
        raise InputError(f"{given[0]} chooses frames of a video that is sent; there is none")


def _check_wire(order: Order, with_files: set[str], sourced: bool) -> None:
    """Raises InputError as the server would."""
    stand_in: dict[str, Any] = dict.fromkeys(with_files | ({"video"} if sourced else set()), b"\x00")
    options: dict[str, Any] = dict(order.options)
    from_tensors(to_tensors(order.clip, order.edit, **options, **stand_in))
