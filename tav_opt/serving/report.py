"""What became of one request: for its line in the log, and for the metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tav_opt.config import EngineName
from tav_opt.contract import Request

STAGES = ("open", "decode", "invert", "sample", "render")
"""Loading the clip; decoding a video that was sent; inversion; sampling; the VAE and the MP4."""

SECONDS = "_seconds"
_GIVEN = ("clip", "output", "prompt", "negative_prompt")
"""What a client wrote, line ends and all."""


@dataclass(kw_only=True)
class Report:
    """Filled in while the request is worked on; what it did not come to stays empty."""

    id: str = ""
    request: Request | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage."""
    stages: list[tuple[str, int, int]] = field(default_factory=list)
    """Each, with its beginning and end in nanoseconds since 1970."""
    steps: dict[str, int] = field(default_factory=dict)
    """Done, of inversion and of sampling."""
    engine: EngineName | None = None
    """What ran the clip."""
    at_once: int = 0
    """Prompts in one batch."""
    together: int = 0
    """Requests whose calls of the network were one, at most."""
    inversion: str = ""
    """Where the start came from: clip, memory, disk, computed, noise."""
    sent_bytes: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began, at = time.perf_counter(), time.time_ns()
        try:
            yield
        finally:
            self.stages.append((name, at, time.time_ns()))
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def fields(self, *, prompts: bool) -> dict[str, Any]:
        """Settings and times; the text of prompts only if asked for."""
        found: dict[str, Any] = {}
        if (request := self.request) is not None:
            edit = request.edit
            source = "video" if request.video is not None else "frames" if request.source_frames is not None else "own"
            found |= {"clip": request.clip, "engine": self.engine or "none", "source": source}
            found |= {"prompts": len(edit.prompts), "at_once": self.at_once, "together": self.together}
            found |= {"steps": edit.steps, "inversion_steps": edit.inversion_steps}
            found |= {"inversion_iterations": edit.inversion_iterations}
            found |= {"guidance_scale": edit.guidance_scale, "solver": edit.solver}
            found |= {"guidance_interval": edit.guidance_interval, "reuse_interval": edit.reuse_interval}
            found |= {"eta": edit.eta, "seed": edit.seed}
            found |= {"output": request.output, "inversion": self.inversion or "none"}
            if prompts:
                found |= {"prompt": list(edit.prompts), "negative_prompt": edit.negative_prompt}
        found |= {f"{name}{SECONDS}": round(self.seconds[name], 3) for name in STAGES if name in self.seconds}
        return {name: value for name, value in found.items() if value is not None} | {"sent": self.sent_bytes}

    def line(self, *, prompts: bool) -> str:
        """The same in words."""
        return " ".join(_said(name, value) for name, value in self.fields(prompts=prompts).items())


def _said(name: str, value: Any) -> str:
    if name.endswith(SECONDS):
        return f"{name.removesuffix(SECONDS)}={value:.3f}s"
    if name in _GIVEN:
        return f"{name}={value!r}"
    return f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
