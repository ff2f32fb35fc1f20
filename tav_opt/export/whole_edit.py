"""One whole guided edit by an engine that was just made, against eager PyTorch in float32: every graph, in the loop.

It costs ten guided predictions of the base's size, five by each, and both models in memory at once. Of a clip longer
than the network takes, it is the first window's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from tav_opt import editing
from tav_opt.config import EditConfig, OnProgress
from tav_opt.engines import Engine
from tav_opt.export.parity import ParityError

E = TypeVar("E", bound=Engine)

STEPS = 5
GUIDANCE_SCALE = 7.5
FULL, HALF = 60.0, 45.0
"""dB of the frames, at least, of float32 engines (a root mean square of a quarter of a grey level) and of half ones."""


@dataclass(frozen=True, kw_only=True)
class EditParity:
    """How near an engine's frames came."""

    psnr: float
    """Of uint8 frames, in dB."""
    least: float
    steps: int = STEPS

    def to_json(self) -> dict[str, Any]:
        return {"psnr": round(self.psnr, 2), "least": self.least, "steps": self.steps, "guidance_scale": GUIDANCE_SCALE}


OnEdit = Callable[[str, EditParity], object]
"""Called with an engine's name and how near its frames came."""


def not_run(why: str) -> dict[str, Any]:
    """What a manifest says of an engine that could not be run where it was made."""
    return {"psnr": None, "why": why}


def check(engine: Engine, eager: Engine, least: float, on_progress: OnProgress | None = None) -> EditParity:
    """Edits the engine's clip to its own caption by both; raises ParityError, naming the figure, below `least` dB."""
    expected, found = (_frames(one, on_progress) for one in (eager, engine))
    parity = EditParity(psnr=psnr(found, expected), least=least)
    if not parity.psnr >= least:
        raise ParityError(
            f"a whole edit by {engine.kind}: {parity.psnr:.1f} dB against eager PyTorch after {STEPS} steps, "
            f"{least:g} dB at least: nothing was written"
        )
    return parity


def _first_window(engine: E) -> E:
    info = engine.info
    if info.window is None:
        return engine
    source, inverted = (x[:, :, : info.window] for x in (engine.source_latents, engine.inverted_latents))
    short = replace(info, frames=info.window, window=None)
    return replace(engine, info=short, source_latents=source, inverted_latents=inverted)  # type: ignore[type-var, return-value]


def _frames(engine: Engine, on_progress: OnProgress | None) -> np.ndarray:
    engine = _first_window(engine)
    config = EditConfig(prompts=(engine.info.prompt,), steps=STEPS, guidance_scale=GUIDANCE_SCALE)
    told = None if on_progress is None else lambda _, step, steps: on_progress(f"edit by {engine.kind}", step, steps)
    return editing.edit(engine, config, on_progress=told)


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Peak signal to noise in dB of uint8 frames; of equal ones, that of a single value that is off by one."""
    squares = np.square(found.astype(np.float64) - expected).sum()
    return float(10 * np.log10(255**2 * expected.size / max(squares, 1.0)))
