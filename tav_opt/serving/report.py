"""What became of one request: for its line in the log, and for the metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tav_opt.config import EngineName
from tav_opt.contract import Request

STAGES = ("open", "decode", "invert", "sample", "render")
"""Loading the clip; decoding a video that was sent; inversion; sampling; the VAE and the MP4."""


@dataclass(kw_only=True)
class Report:
    """Filled in while the request is worked on; what it did not come to stays empty."""

    id: str = ""
    request: Request | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage."""
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
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def line(self, *, prompts: bool) -> str:
        """Settings and times in words; the text of prompts only if asked for."""
        parts = []
        if (request := self.request) is not None:
            edit = request.edit
            source = "video" if request.video is not None else "frames" if request.source_frames is not None else "own"
            parts += [
                f"clip={request.clip!r} engine={self.engine or 'none'} source={source}",
                f"prompts={len(edit.prompts)} at_once={self.at_once} together={self.together}",
                f"steps={edit.steps} inversion_steps={edit.inversion_steps} guidance_scale={edit.guidance_scale:g}",
                f"inversion_iterations={edit.inversion_iterations}",
                f"solver={edit.solver} guidance_interval={edit.guidance_interval}",
                f"eta={edit.eta:g} seed={edit.seed} output={request.output!r} inversion={self.inversion or 'none'}",
            ]
            if prompts:
                parts.append(f"prompt={edit.prompts!r} negative_prompt={edit.negative_prompt!r}")
        parts += [f"{name}={self.seconds[name]:.3f}s" for name in STAGES if name in self.seconds]
        parts.append(f"sent={self.sent_bytes}")
        return " ".join(parts)
