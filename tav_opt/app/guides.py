"""What an edit is told beside its words by files: a mask, and maps to follow, each named for its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from tav_opt.app import controls, markup
from tav_opt.app.controls import Setting
from tav_opt.config import Control, Fit, InputError
from tav_opt.contract import STREAM_INPUTS, ServedClip
from tav_opt.served_tensors import OF_CONTROLS

OF_MAPS = {f"control_{name}": name for name in OF_CONTROLS}
"""Inputs of an edit with a number for each map, and what a Control calls them."""
SAID = (
    "A mask, an image or a video, is white where the picture may change. Maps are videos, each named for its network of"
    " the clip's base, as canny.mp4; what is said of them is one number for all, or one a map, with commas between."
)


@dataclass(frozen=True, kw_only=True)
class Guided:
    """What was dropped in, and how far it is followed."""

    mask: Path | None = None
    maps: Mapping[str, Path]
    """By the names of the networks."""
    settings: Mapping[str, Any]
    """Those that were given, by the names of their inputs."""

    @property
    def files(self) -> list[str]:
        """Their names."""
        return [path.name for path in (self.mask, *self.maps.values()) if path is not None]

    @property
    def of_edit(self) -> dict[str, Any]:
        """Settings of an EditConfig; raises InputError for numbers that belong to no map."""
        if not self.maps:
            if self.settings:
                raise InputError(f"{next(iter(self.settings)).replace('_', ' ')} is of maps to follow: there are none")
            return {}
        own = [dict[str, Any](name=name) for name in self.maps]
        for name, field in OF_MAPS.items():
            values = self.settings.get(name, ())
            if len(values) not in (0, 1, len(own)):
                said = controls.words(values)
                raise InputError(f"{name.replace('_', ' ')} {said}: must be one for all, or {len(own)}, one a map")
            for control, value in zip(own, values * len(own) if len(values) == 1 else values, strict=False):
                control[field] = value
        follow = tuple(Control(**control) for control in own)
        return {"controls": follow, "control_inversion": self.settings.get("control_inversion", False)}

    def fitted_maps(self, frames: int, clip: ServedClip, fit: Fit) -> dict[str, np.ndarray]:
        """So many frames of the clip's size, uint8 (f, H, W, 3); raises InputError as `read_maps` does."""
        from tav_opt.conditions.maps import read_maps

        return {name: read_maps(path, frames, clip.height, clip.width, fit=fit) for name, path in self.maps.items()}


class Guides:
    """Their drawer on the first tab."""

    def __init__(self) -> None:
        inputs = [tensor for tensor in STREAM_INPUTS if tensor.name in (*OF_MAPS, "control_inversion")]
        self.settings = [
            Setting(
                name=tensor.name,
                kind=bool if tensor.dtype == "BOOL" else tuple[float, ...],
                doc=tensor.doc,
            )
            for tensor in inputs
        ]
        with gr.Accordion("Mask, and maps to follow", open=False, elem_id="guides"):
            gr.HTML(markup.note(SAID))
            with gr.Row():
                self.mask = gr.File(label="Mask", elem_id="mask", height=140, min_width=150)
                self.maps = gr.File(label="Maps", elem_id="maps", height=140, min_width=150, file_count="multiple")
            self.shown = controls.drawer(self.settings, prefix="set")

    @property
    def inputs(self) -> list[Any]:
        """All that `read` takes."""
        return [self.mask, self.maps, *self.shown]

    def read(self, mask: str | None, maps: Sequence[str] | None, *shown: Any) -> Guided:
        """What the drawer holds; raises InputError for what no setting can be and for two maps of one name."""
        named: dict[str, Path] = {}
        for path in map(Path, maps or ()):
            if path.stem in named:
                raise InputError(f"{path.name}: there are maps for {path.stem!r} already")
            named[path.stem] = path
        settings = controls.given(self.settings, shown)
        return Guided(mask=Path(mask) if mask else None, maps=named, settings=settings)
