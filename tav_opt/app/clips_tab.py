"""The third tab: what is exported, and how the server is."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from tav_opt.app import markup
from tav_opt.app.app_config import AppConfig
from tav_opt.app.backends import Backend
from tav_opt.app.edit_tab import AT_ONCE, NO_CLIP
from tav_opt.client import ServerError
from tav_opt.config import InputError
from tav_opt.repository import clips
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
        if self.config.clips:
            yield self._of_the_server()
            return
        if not version_folder(self.config.repository).is_dir():
            yield markup.note(f"{self.config.repository} is no model repository yet: the first export makes it one.")
            return
        damaged: list[str] = []
        found = clips.clips(self.config.repository, on_damaged=lambda name, error: damaged.append(f"{name}: {error}"))
        rows = [
            (
                clip.name,
                clip.info.prompt,
                str(clip.info.frames),
                f"{clip.info.width}×{clip.info.height}",
                f"{clip.info.fps:g}",
                f"{clip.size / 1e6:.1f} MB",
                f"{clip.info.exported_base[:16]}, {clip.base_size / 1e6:.1f} MB",
            )
            for clip in found
        ]
        yield markup.table(HEADS, rows) if rows else markup.note(NO_CLIP)
        yield from map(markup.error, damaged)

    def _of_the_server(self) -> str:
        """Clips that were named, as the server tells of them."""
        rows, lacking = [], []
        for name in self.config.clips:
            try:
                clip = self.backend.clip(name)
            except (InputError, ServerError) as error:
                lacking.append(markup.error(f"{name}: {error}"))
            else:
                size = f"{clip.width}×{clip.height}"
                rows.append((name, clip.prompt, str(clip.frames), size, f"{clip.fps:g}"))
        return (markup.table(HEADS[:5], rows) if rows else "") + "".join(lacking)
