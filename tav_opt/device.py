"""The device that a name means, on this machine."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tav_opt.config import InputError


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name, for `auto` a GPU where there is one, else the processor.

    Raises InputError where there is none of that name on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # a name may be right, and what it names not there
    except Exception as error:  # each kind of device has its own
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"device {str(name)!r} cannot be used; {', '.join(here)} can ({reason})") from None
    return device


def dtype_on(device: torch.device, dtype: torch.dtype | None = None) -> torch.dtype:
    """What networks compute in on a device: the dtype that is asked for, else float16 on GPUs, float32 elsewhere."""
    return dtype or (torch.float16 if device.type == "cuda" else torch.float32)


def told(device: torch.device, dtype: torch.dtype) -> str:
    """In words: `cuda:0 (NVIDIA H100) in float16`."""
    card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device}{card} in {str(dtype).removeprefix('torch.')}"


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the one that libraries work on which are told of none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Pace:
    """Holds a loop of launches back, so that it is never more than a step ahead of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._before: torch.cuda.Event | None = None

    def keep(self) -> None:
        """At the end of a step: waits until the step before it has been computed."""
        if self._device is None:
            return
        launched = torch.cuda.Event()
        launched.record(torch.cuda.current_stream(self._device))
        if self._before is not None:
            self._before.synchronize()
        self._before = launched
