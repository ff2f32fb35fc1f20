"""How an edit can fail, and what the client is told of it."""

from __future__ import annotations

from typing import Literal

from tav_opt.config import InputError
from tav_opt.ddim import Stopped

Status = Literal["INVALID_ARGUMENT", "NOT_FOUND", "CANCELLED", "UNAVAILABLE", "INTERNAL"]
"""As gRPC names them."""


class UnknownClip(InputError):
    """No clip of that name is exported."""


class Unavailable(RuntimeError):
    """Nothing is wrong with the request, but the machine cannot do it now."""


class DeadlinePassed(Stopped):
    """The time that the request allowed is over."""


def status(error: BaseException) -> Status:
    """What a failure is called on the wire."""
    match error:
        case UnknownClip():
            return "NOT_FOUND"
        case InputError():
            return "INVALID_ARGUMENT"
        case Stopped():
            return "CANCELLED"
        case Unavailable() | MemoryError():
            return "UNAVAILABLE"
    return "INTERNAL"


def message(error: BaseException) -> str:
    """What the client is told of a failure, in one line."""
    match error:
        case InputError() | Unavailable() | DeadlinePassed():
            return str(error)
        case Stopped():
            return "the edit was cancelled"
        case MemoryError():
            return "the server ran out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0]
