"""Settings as controls of the page, made from the classes that declare them: a new one appears by itself."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import gradio as gr
from gradio.components import Component

from tav_opt.config import FILLED_IN, EditConfig, InputError, Within, described, ranges
from tav_opt.contract import CONTROL_INPUTS, STREAM_INPUTS, Request

ELSEWHERE = (
    *("clip", "prompt", "negative_prompt", "preset", "video", "source_frames", "mask", "output", "preview_interval"),
    *CONTROL_INPUTS,
)
"""Inputs of an edit that have a place of their own on the page, or that it decides itself."""
ON, OFF = "on", "off"
MOST = 10**5
"""A range that ends above is not worth its digits."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting: left empty it is not given, and its default stands, or what a clip or preset has in its place."""

    name: str
    kind: Any
    """int, float, bool, str, a tuple type, or the choices' values."""
    doc: str = ""
    default: Any = None
    within: Within | None = None
    filled_in: str = ""
    """Who may have another default."""

    @property
    def label(self) -> str:
        """As people read it."""
        return self.name.replace("_", " ")

    def control(self, **more: Any) -> Component:
        """The component, empty, that says what its default is."""
        info = self.doc if self.within is None or self.within.high > MOST else f"{self.doc.rstrip('.')} ({self.within})"
        said: dict[str, Any] = {"label": self.label, "info": info, "min_width": 150} | more
        usual = "not given" if self.default is None else f"default: {words(self.default)}"
        if self.filled_in:
            usual = f"{self.filled_in}'s, or {words(self.default)}"
        if isinstance(self.kind, tuple):
            return gr.Dropdown([(usual, ""), *((str(one), one) for one in self.kind)], value="", **said)
        if self.kind is bool:
            return gr.Dropdown([(usual, ""), ON, OFF], value="", **said)
        # Numbers too: a gr.Number cannot be empty, it shows and sends 0.
        lines = 2 if get_origin(self.kind) is tuple and get_args(self.kind)[0] is str else 1
        return gr.Textbox(value="", placeholder=usual, lines=lines, **said)

    def read(self, shown: Any) -> Any:
        """What a control holds as the setting's value, None where it is empty; raises InputError where it is none."""
        if shown is None or shown == "" or shown == []:
            return None
        if self.kind is bool:
            return shown == ON
        if self.kind in (int, float):
            try:
                return self.kind(shown)
            except ValueError:
                number = "whole number" if self.kind is int else "number"
                raise InputError(f"{self.label} {shown[:63]!r} is no {number}") from None
        if get_origin(self.kind) is tuple:
            return self._several(shown)
        return shown

    def shown(self, value: Any) -> Any:
        """The inverse of `read`: what the control shows."""
        if value is None:
            return ""
        return value if isinstance(self.kind, tuple) else words(value)

    def _several(self, shown: str) -> tuple[Any, ...]:
        """Texts, one a line; or numbers with commas between them."""
        one = get_args(self.kind)[0]
        if one is str:
            return tuple(line.strip() for line in shown.splitlines() if line.strip())
        try:
            return tuple(map(one, shown.split(",")))
        except ValueError:
            raise InputError(f"{self.label} {shown!r} is not numbers with commas between them") from None


def words(value: Any) -> str:
    """A setting's value, as people read and write it."""
    if isinstance(value, bool):
        return ON if value else OFF
    if isinstance(value, tuple | list):
        return ("\n" if value and isinstance(value[0], str) else ", ").join(map(str, value)) or "none"
    return str(value)


def _kind(hint: Any) -> Any:
    """Of a type hint, ranges and None taken away; the choices of a Literal; None for what no control holds."""
    while get_origin(hint) in (Union, types.UnionType):
        hint = next(one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Literal:
        return get_args(hint)
    return hint if hint in (int, float, bool, str) or get_origin(hint) is tuple else None


def of_fields(
    kind: type, names: Collection[str] | None = None, *, without: Collection[str] = (), of_model: Collection[str] = ()
) -> list[Setting]:
    """A configuration's settings, in its order, without those that no control holds (paths, other configurations).

    `of_model`: those that a model may have another default for.
    """
    hints, docs, within = get_type_hints(kind), described(kind), ranges(kind)
    found = []
    for one in fields(kind):
        held = _kind(hints[one.name])
        if held is not None and one.name not in without and (names is None or one.name in names):
            default = None if one.default is MISSING else one.default
            setting = Setting(
                name=one.name,
                kind=held,
                doc=docs.get(one.name, ""),
                default=default,
                within=within.get(one.name),
                filled_in="model" if one.name in of_model else "",
            )
            found.append(setting)
    return found


def of_an_edit() -> list[Setting]:
    """All that the contract lets a request say, but for what stands ELSEWHERE and arrays."""
    known = {s.name: s for kind in (Request, EditConfig) for s in of_fields(kind)}
    tensors = [t for t in STREAM_INPUTS if t.name in known and t.name not in ELSEWHERE]
    return [
        Setting(
            name=tensor.name,
            kind=known[tensor.name].kind,
            doc=tensor.doc,
            default=known[tensor.name].default,
            within=known[tensor.name].within,
            filled_in="clip" if tensor.name in FILLED_IN else "",
        )
        for tensor in tensors
    ]


def unshown() -> list[str]:
    """Inputs of an edit that this page cannot take: arrays."""
    shown = {setting.name for setting in of_an_edit()} | set(ELSEWHERE)
    return [tensor.name for tensor in STREAM_INPUTS if tensor.name not in shown]


def drawer(settings: Sequence[Setting], *, prefix: str, columns: int = 2) -> list[Any]:
    """Their controls, in rows."""
    made: list[Any] = []
    for start in range(0, len(settings), columns):
        with gr.Row():
            some = settings[start : start + columns]
            made += [setting.control(elem_id=f"{prefix}-{setting.name}") for setting in some]
    return made


def given(settings: Sequence[Setting], shown: Sequence[Any]) -> dict[str, Any]:
    """What the controls say, by name; what is left empty is not there. Raises InputError as `Setting.read` does."""
    read = ((setting.name, setting.read(value)) for setting, value in zip(settings, shown, strict=True))
    return {name: value for name, value in read if value is not None}


def back(settings: Sequence[Setting], values: Mapping[str, Any]) -> list[Any]:
    """What the controls show for such settings."""
    return [setting.shown(values.get(setting.name)) for setting in settings]
