"""What the edit of one request needs in memory, beside the edits that are in hand."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tav_opt.conditions.attention_control import CONTROL
from tav_opt.contract import Request
from tav_opt.reuse import FEATURES
from tav_opt.serving.failures import Unavailable
from tav_opt.serving.served_engine import ServedEngine

LATENT_COPIES = 8
"""That a step holds of its latents, of each prompt with and without its text."""


def prompts_at_once(engine: ServedEngine, request: Request, free: int, *, beside: int, windows: int) -> tuple[int, int]:
    """How many prompts one batch may have `beside` those of other edits, and the bytes that it needs.

    `windows` of a long clip go through the network at once. Raises Unavailable where memory is short of one prompt.
    """
    prompts = 1 if request.edit.controlled else len(request.edit.prompts)  # with control a prompt at a time
    while (needed := _bytes_of(engine, request, prompts, beside=beside, windows=windows)) > free and prompts > 1:
        prompts = (prompts + 1) // 2
    return prompts, _checked(needed, free)


def bytes_of_length(
    engine: ServedEngine, request: Request, start: Tensor, at_once: int, free: int, *, beside: int, windows: int
) -> int:
    """Bytes that an edit of more frames than the clip's, those of `start` (…, c, f, h, w), needs from now on.

    `at_once` prompts make a batch, `beside` those of other edits. Raises Unavailable where fewer are free.
    """
    info, prompts, frames = engine.info, len(request.edit.prompts), start.shape[2]
    more = frames - info.frames
    latents = LATENT_COPIES * (prompts + 1) * start.nbytes * more // frames
    pixels = 2 * prompts * more * info.height * info.width * 3
    network = _bytes_of(engine, request, at_once, beside=beside, windows=windows, frames=frames)
    return _checked(network + latents + pixels, free)


def _bytes_of(
    engine: ServedEngine, request: Request, prompts: int, *, beside: int, windows: int, frames: int = 0
) -> int:
    """What so many prompts need for them alone, or add to the batch of others: whichever is more."""
    controlled = request.edit.controlled
    rows = prompts + controlled  # its source counts as one more
    bytes_of = partial(
        engine.extra_bytes,
        encode=request.video is not None or request.source_frames is not None,
        windows=windows,
        told=("text", *(CONTROL if controlled else ()), *((FEATURES,) if request.edit.reuse_interval > 1 else ())),
        controls=[one.name for one in request.edit.controls],
        frames=frames,
    )
    promised = engine.extra_bytes(beside) if beside else 0  # by those edits
    return max(bytes_of(rows + beside) - promised, bytes_of(rows))


def _checked(needed: int, free: int) -> int:
    """The bytes that are needed; raises Unavailable where fewer are free."""
    if needed > free:
        raise Unavailable(
            f"the edit needs about {needed / 2**30:.2f} GiB, the server has {free / 2**30:.2f} GiB free: "
            "try again later"
        )
    return needed
