"""The server's log: lines for people, or one JSON object a line for what collects logs."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]
VARIABLE = "TAV_OPT_LOG_FORMAT"
"""Of the processes that the host starts."""

_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "fatal"}
_TRITONS = re.compile(r"(?P<level>[IWEF])\d{4} [\d:.]+ \d+ (?P<logger>\S+:\d+)\] (?P<message>.*)", re.DOTALL)
"""A line as Triton writes it; it quotes what is logged as JSON does."""


def tell(message: str, format: LogFormat, level: str = "warning", **fields: Any) -> None:  # noqa: A002
    """Says something of the server itself, on stderr."""
    if format == "text":
        print(f"tav-opt serve: {message}", file=sys.stderr, flush=True)
    else:
        write(_line(level, "tav-opt", message, fields))


def line(written: str, format: LogFormat) -> str:  # noqa: A002
    """A line that Triton or its worker wrote, in a format."""
    if format == "text":
        return written
    found = _TRITONS.fullmatch(written.rstrip("\n"))
    if found is None:
        return _line("info", "triton", written.rstrip("\n"), {})
    message = _unquoted(found["message"])
    return _line(_LEVELS[found["level"]], found["logger"], message, _fields(message))


def write(text: str) -> None:
    """A whole line on stderr."""
    sys.stderr.write(text)
    sys.stderr.flush()


def _line(level: str, logger: str, message: str, fields: dict[str, Any]) -> str:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    told = {"time": now, "level": level, "logger": logger, "message": message, **fields}
    return json.dumps(told, ensure_ascii=False) + "\n"


def _unquoted(message: str) -> str:
    try:
        text = json.loads(message)
    except ValueError:
        return message
    return text if isinstance(text, str) else message


def _fields(message: str) -> dict[str, Any]:
    """Of a message that is an object itself: its own `message` takes the place of the whole."""
    try:
        found = json.loads(message)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
