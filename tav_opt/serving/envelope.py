"""What a request carries beside its inputs: an id, a timeout, and parameters, of which unknown ones are refused.

Both models read it here. Triton itself takes its own parameters (priority, timeout, sequence_id, …) out of gRPC and of
HTTP `infer`; `generate` makes a parameter of every JSON entry that is no input, so that a slip of the pen comes as one.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tav_opt.config import InputError

CALLER = "caller"
"""The parameter with which one model of the server tells another who asks."""
_TRITONS = re.compile(r"(id|binary_data_output|priority|timeout|sequence_(id|start|end)|triton_.*)\Z", re.DOTALL)


def request_id(request: Any) -> str:
    """The one that the client gave, or a new one; one that is not UTF-8 counts as none."""
    try:
        given = str(request.request_id())
    except UnicodeDecodeError:
        given = ""
    return given or secrets.token_hex(6)


def asked_for(request: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs that a request names; without names Triton fills in all.

    The Python backend of Triton 2.51 takes others out by itself, without Python's lock: on Python 3.12 it dies of that.
    """
    names = set(request.requested_output_names())
    return {name: array for name, array in tensors.items() if name in names}


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What was read."""

    timeout_us: int
    """Microseconds from now after which nobody waits for the answer any more; 0: none."""
    caller: Any = None
    """What should be the name of a `caller.Caller`; None where a client asked."""


def read(request: Any, inputs: Iterable[str], *, caller: bool = False) -> Envelope:
    """Reads a request's parameters; `caller`: that one is known. Raises InputError for others that are not Triton's."""
    try:
        found = json.loads(request.parameters() or "{}")
    except ValueError:
        raise InputError("the request's parameters are not UTF-8") from None
    known = {CALLER} if caller else set()
    if unknown := sorted(name for name in found if name not in known and not _TRITONS.match(name)):
        raise InputError(f"parameter {unknown[0][:63]!r} is unknown; settings are inputs: {', '.join(inputs)}")
    return Envelope(timeout_us=request.timeout() or _timeout(found.get("timeout", 0)), caller=found.get(CALLER))


def _timeout(value: Any) -> int:
    # Of `generate`, which does not take it out.
    if type(value) is not int or value < 0:
        raise InputError(f"timeout {value!r} is not a number of microseconds")
    return value
