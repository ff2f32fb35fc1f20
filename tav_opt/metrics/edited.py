"""An edit with all that it is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tav_opt.config import InputError, check_text, documented


@documented
@dataclass(frozen=True, kw_only=True)
class Edited:
    """An edit and what it is measured against; raises InputError where they do not belong together."""

    frames: np.ndarray
    """uint8 (f, H, W, 3)."""
    source: np.ndarray
    """What was edited, of the same shape."""
    prompt: str
    """What the edit shall show."""
    source_prompt: str | None = None
    """What the source shows."""
    mask: np.ndarray | None = None
    """bool (1 or f, H, W), true where the picture may change."""

    def __post_init__(self) -> None:
        for name, frames in (("edit", self.frames), ("source", self.source)):
            if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
                raise InputError(f"{name}: frames {frames.dtype} {frames.shape} must be uint8 (f, H, W, 3)")
        if self.frames.shape != self.source.shape:
            raise InputError(
                f"edit of {_told(self.frames)}, source of {_told(self.source)}: they must be alike, frame by frame"
            )
        for name, prompt in (("prompt", self.prompt), ("source prompt", self.source_prompt)):
            if prompt is not None:
                check_text(name, prompt)
                if not prompt.strip():
                    raise InputError(f"{name} {prompt!r} is empty: it must say what is shown")
        if self.mask is not None:
            self._check_mask(self.mask)

    def _check_mask(self, mask: np.ndarray) -> None:
        if mask.dtype != np.bool_ or mask.ndim != 3 or mask.shape[1:] != self.frames.shape[1:3]:
            raise InputError(f"mask of {_told(mask)}, edit of {_told(self.frames)}: they must be alike")
        if len(mask) not in (1, len(self.frames)):
            raise InputError(f"mask of {_told(mask)}, edit of {_told(self.frames)}: it must have one frame, or as many")
        if mask.all():
            raise InputError("mask: it is white all over and leaves no background to compare")


def _told(frames: np.ndarray) -> str:
    """In words: `24 frames of 512×512`."""
    return f"{len(frames)} frame{'s' * (len(frames) != 1)} of {frames.shape[2]}×{frames.shape[1]}"
