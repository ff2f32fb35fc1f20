"""The edits that a browser made, as it remembers them: their settings, and the names of the files kept here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

MOST = 30
"""Edits; a browser keeps some five megabytes for a page."""
STORAGE = "tav-opt edits"

Entry = dict[str, Any]
"""key, at, clip, prompt, negative_prompt, preset, settings, seconds; JSON."""


def entry(key: str, prompt: str, seconds: float, **asked: Any) -> Entry:
    """Of one edit that is done."""
    at = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"key": key, "at": at, "prompt": prompt, "seconds": round(seconds, 1), **asked}


def added(history: Any, entries: Sequence[Entry]) -> list[Entry]:
    """The history, newest first, as long as a browser keeps it."""
    return [*reversed(entries), *checked(history)][:MOST]


def checked(history: Any) -> list[Entry]:
    """What a browser remembers, without what it cannot have from here."""
    wanted = {
        "key": str,
        "at": str,
        "clip": str,
        "prompt": str,
        "negative_prompt": str,
        "preset": str,
        "settings": dict,
    }
    entries = history if isinstance(history, list) else []
    return [
        one
        for one in entries
        if isinstance(one, dict) and all(isinstance(one.get(name), kind) for name, kind in wanted.items())
    ]


def find(history: Any, key: str) -> Entry | None:
    """The entry of that key."""
    return next((one for one in checked(history) if one["key"] == key), None)


def choices(history: Any) -> list[tuple[str, str]]:
    """Labels and keys, newest first."""
    return [(_label(one), one["key"]) for one in checked(history)]


def _label(one: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in one["settings"].items())
    preset = "" if one["preset"] == "exact" else one["preset"]
    told = " · ".join(filter(None, (one["at"][11:16], one["prompt"], one["clip"], preset, settings)))
    return told if len(told) <= 140 else told[:139] + "…"
