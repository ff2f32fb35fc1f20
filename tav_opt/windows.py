"""Clips longer than the network takes at once: windows that overlap, denoised together.

At every step each window is predicted by itself, and where windows overlap their predictions are averaged by weights
that rise and fall (MultiDiffusion, Bar-Tal et al. 2023, arXiv 2302.08113; Gen-L-Video, Wang et al. 2023, arXiv
2305.18264). The clip's frame 0 stands first in every window: sparse-causal attention looks at it from every frame, so
that appearance holds over the whole clip.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tav_opt.conditions.condition import is_added
from tav_opt.config import InputError
from tav_opt.ddim import Predict, Text, Timestep

OVERLAP = 0.25
"""The part of a window that its neighbour has too, at least."""


def begins(total: int, window: int) -> list[int]:
    """Where the windows of a clip begin, spread evenly: the first at 0, the last at `total` − `window`.

    Raises InputError for a clip that is shorter than a window.
    """
    if total < window:
        raise InputError(f"{total} frames, but the network takes {window} at once: give {window} or more")
    stride = max(1, window - 1 - round(OVERLAP * window))
    gaps = -(-(total - window) // stride)
    return [number * (total - window) // gaps for number in range(gaps + 1)] if gaps else [0]


def cut(latents: Tensor, begin: int, window: int) -> Tensor:
    """The window (b,c,window,h,w) that begins at a frame of latents (b,c,f,h,w): frame 0, and those behind `begin`."""
    return torch.cat([latents[:, :, :1], latents[:, :, begin + 1 : begin + window]], 2)


@lru_cache(64)
def weights(total: int, window: int) -> Tensor:
    """How much each window's prediction counts: (windows, window), those of one frame of the clip sum to 1.

    They rise to the window's middle and fall again, from its second frame on; frame 0 is the first window's own.
    """
    steps = torch.arange(1, window, dtype=torch.float64)
    found = torch.zeros(len(begins(total, window)), total, dtype=torch.float64)
    for row, begin in zip(found, begins(total, window), strict=True):
        row[begin + 1 : begin + window] = torch.minimum(steps, window - steps)
    found[0, 0] = 1
    found /= found.sum(0)
    return torch.stack(
        [
            torch.cat([row[:1], row[begin + 1 : begin + window]])
            for row, begin in zip(found, begins(total, window), strict=True)
        ]
    )


def windowed(predict: Predict, window: int, *, at_once: int = 1) -> Predict:
    """`predict` for latents of any number of frames, made of one that takes `window` of them.

    So many windows of a step go through it `at_once`, one behind the other in the batch. Latents of `window` frames
    are handed on as they are. Of a text that is a mapping, what conditions add, (b,f,c',h',w'), and tensors (b,c,f,h,w)
    are cut as the latents are. Raises InputError for fewer frames.
    """

    def whole(latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        total = latents.shape[2]
        if total == window:
            return predict(latents, timestep, text)
        shares = _weights_on(total, window, latents.device, latents.dtype)
        places = list(zip(begins(total, window), shares, strict=True))
        found: Tensor | None = None
        for first in range(0, len(places), at_once):
            part = places[first : first + at_once]
            own = [begin for begin, _ in part]
            rows = torch.cat([cut(latents, begin, window) for begin in own])
            answers = predict(rows, _for_each(timestep, own), _of_windows(text, own, total, window))
            if found is None:  # with as many channels as are predicted
                found = answers.new_zeros(len(latents), answers.shape[1], *latents.shape[2:])
            for (begin, share), answer in zip(part, answers.chunk(len(part)), strict=True):
                weighted = answer * share[:, None, None]
                found[:, :, :1] += weighted[:, :, :1]
                found[:, :, begin + 1 : begin + window] += weighted[:, :, 1:]
        assert found is not None
        return found

    return whole


@lru_cache(64)
def _weights_on(total: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copied once, not at every step."""
    return weights(total, window).to(device, dtype)


def _for_each(timestep: Timestep, begins: list[int]) -> Timestep:
    """One for all rows as it is, one a row (b,) repeated."""
    return torch.cat([timestep] * len(begins)) if isinstance(timestep, Tensor) and timestep.ndim else timestep


def _of_windows(text: Text, begins: list[int], total: int, window: int) -> Text:
    if isinstance(text, Tensor):
        return torch.cat([text] * len(begins))
    return {name: torch.cat(_cuts(name, value, begins, total, window)) for name, value in text.items()}


def _cuts(name: str, value: Tensor, begins: list[int], total: int, window: int) -> list[Tensor]:
    if is_added(name):
        return [cut(value.transpose(1, 2), begin, window).transpose(1, 2) for begin in begins]
    if value.ndim == 5 and value.shape[2] == total:
        return [cut(value, begin, window) for begin in begins]
    return [value] * len(begins)
