"""What all settings have in common: descriptions under fields, ranges beside defaults, one line for what is wrong."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

C = TypeVar("C", bound=Any)
T = TypeVar("T")


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that names the value and what would be right."""


def first_line(error: Exception) -> str:
    """What a library's error says, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_WEIGHTS = re.compile(
    r"\([^()]*:\s*\d+(\.\d+)?\s*\)|\(\(|\[[^\[\]]+\]|<(lora|lyco|hypernet):[^<>]+>|\b(BREAK|AND)\b(?=\s+\S)"
)
"""`(word:1.3)`, `((word))`, `[word]`, `<lora:name:1>`, BREAK and AND in capitals."""


def literal_weights(prompts: Iterable[str]) -> str | None:
    """One line where a prompt has the weight syntax of Stable Diffusion web UIs, which is drawn as it stands."""
    for prompt in prompts:
        if prompt.upper() != prompt and (found := _WEIGHTS.search(prompt)):
            return f"{found[0]!r} in a prompt is no weight here: it is read as words, like the rest"
    return None


def texts(name: str, given: str | Iterable[str]) -> tuple[str, ...]:
    """One text is one, not its letters; raises InputError, with `name`, for what is neither a text nor several."""
    if isinstance(given, str):
        return (given,)
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(item, str) for item in found):
        raise InputError(f"{name} {given!r}: must be a text or several")
    return found


def documented(kind: type[T]) -> type[T]:
    """Adds the strings under a class's fields, also inherited ones, to its docstring, where help() shows them."""
    lines = [f"    {name}: {text}" for name, text in described(kind).items()]
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", "Attributes:", *lines])
    return kind


def described(kind: type) -> dict[str, str]:
    """What the strings under a class's fields say, also inherited ones, by the field's name."""
    own = [owner for owner in reversed(kind.__mro__) if owner is not object]
    said = {name: text for owner in own for name, text in _under_fields(owner.__module__).get(owner.__name__, ())}
    return {name: " ".join(text.split()) for name, text in said.items()}


@cache
def _under_fields(module: str) -> dict[str, list[tuple[str, str]]]:
    """Names and strings of the fields of a module's classes, which exist in its source alone."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # without source; built in
        return {}
    return {node.name: list(_strings(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _strings(node: ast.ClassDef) -> Iterable[tuple[str, str]]:
    for field, below in zip(node.body, node.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, text


@documented
@dataclass(frozen=True)
class Within:
    """The range of a number, beside its default."""

    low: float
    """The least."""
    high: float
    """The most."""
    below: bool = False
    """The upper end itself is out."""

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.below and value == self.high)  # false for NaN

    def __str__(self) -> str:
        return f"{self.low}…{'<' if self.below else ''}{self.high}"


def ranges(kind: type) -> dict[str, Within]:
    """By field; one that a subclass declares anew keeps the range that it had."""
    return {
        name: extra
        for one in reversed(kind.__mro__)
        for name, hint in get_type_hints(one, include_extras=True).items()
        for extra in _extras(hint)
        if isinstance(extra, Within)
    }


def _extras(hint: Any) -> Iterable[Any]:
    """Of an annotated type, and of one that may be None."""
    parts = (hint, *getattr(hint, "__args__", ()))
    return [extra for part in parts for extra in getattr(part, "__metadata__", ())]


def check_numbers(config: Any) -> None:
    """Raises InputError for a number of a configuration, or of one in it, that is out of its range, naming both."""
    found = ranges(type(config))
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        if is_dataclass(value):
            check_numbers(value)
        for number in value if isinstance(value, tuple) else (value,):
            if is_dataclass(number) and number is not value:
                check_numbers(number)
            if name in found and number is not None and number not in found[name]:
                raise InputError(f"{name.replace('_', ' ')} {number} is not within {found[name]}")


def with_absolute_paths(config: C) -> C:
    """The configuration with its paths, those of nested ones too, as they are seen from the present folder."""
    changed: dict[str, Any] = {}
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        if isinstance(value, Path):
            changed[name] = value.absolute()
        elif is_dataclass(value):
            changed[name] = with_absolute_paths(value)
    return replace(config, **changed)


def check_text(name: str, text: str) -> None:
    """Raises InputError for a text that is no UTF-8: a command line's bytes that are none come as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} {text!a} is not UTF-8") from None


class Config:
    """Fields also take what lies near: text or os.PathLike for a path, one text or a list where several may be."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if hints[field.name] in (Path, Path | None) and isinstance(value, str | os.PathLike):
                object.__setattr__(self, field.name, Path(value))
            elif hints[field.name] == tuple[str, ...]:
                object.__setattr__(self, field.name, texts(field.name, value))
