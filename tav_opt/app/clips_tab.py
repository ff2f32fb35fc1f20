"""The third tab: what is exported, and how the server is."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from tav_opt.app import markup
from tav_opt.app.app_config import AppConfig
from tav_opt.app.backends import Backend, served
from tav_opt.app.edit_tab import AT_ONCE, NO_CLIP
from tav_opt.client import ServerError
from tav_opt.config import InputError
from tav_opt.repository import clips
from tav_opt.repository.clips import Clip
from tav_opt.repository.layout import version_folder

HEADS = ("Clip", "Caption", "Frames", "Size", "Frames a second", "Own values", "Base")


class ClipsTab:
    """Its components, and what they do."""

    def __init__(self, config: AppConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend
        self.health = gr.HTML(elem_id="health")
        self.clips = gr.HTML(elem_id="clips")
        self.again = gr.Button("Look again", size="sm", elem_id="look-again")
        self.again.click(self.looked, None, [self.health, self.clips], **AT_ONCE)

    def looked(self) -> tuple[str, str]:
        """The server's health and the clips, as they are now."""
        return markup.health(*self.backend.health()), "".join(self._clips())

    def _clips(self) -> Iterator[str]:
        damaged: list[str] = []
        found: list[Clip] = []
        folder = self.config.repository
        if here := version_folder(folder).is_dir():
            found = clips.clips(folder, on_damaged=lambda name, error: damaged.append(f"{name}: {error}"))
        names = served(self.config)
        if names:
            yield self._of_the_server(names)
        elif names is None and found:
            yield markup.table(HEADS, map(_row, found))
        elif here or names is not None:
            yield markup.note(NO_CLIP)
        else:
            yield markup.note(f"{folder} is no model repository yet: the first export makes it one.")
        yield from map(markup.error, damaged)

    def _of_the_server(self, names: list[str]) -> str:
        """As it tells of them."""
        rows, lacking = [], []
        for name in names:
            try:
                clip = self.backend.clip(name)
            except (InputError, ServerError) as error:
                lacking.append(markup.error(f"{name}: {error}"))
            else:
                size = f"{clip.width}×{clip.height}"
                rows.append((name, clip.prompt, str(clip.frames), size, f"{clip.fps:g}"))
        return (markup.table(HEADS[:5], rows) if rows else "") + "".join(lacking)


def _row(clip: Clip) -> tuple[str, ...]:
    info = clip.info
    size, own = f"{info.width}×{info.height}", f"{clip.size / 1e6:.1f} MB"
    base = f"{info.exported_base[:16]}, {clip.base_size / 1e6:.1f} MB"
    return clip.name, info.prompt, str(info.frames), size, f"{info.fps:g}", own, base
