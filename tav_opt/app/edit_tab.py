"""The first tab: a clip, prompts and settings in; previews while it samples; the edit beside its source."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from tav_opt.app import controls, edit_history, markup
from tav_opt.app.app_config import AppConfig
from tav_opt.app.backends import Backend, names
from tav_opt.app.clip_source import ClipSources
from tav_opt.app.edit_job import EditJobs, Told, was_cancelled
from tav_opt.app.guides import Guides
from tav_opt.app.kept_results import KINDS, Kept, KeptResults
from tav_opt.client import Edit, Options, ServerError
from tav_opt.client.sources import FITTING, fitted
from tav_opt.config import CONTROL_SETTINGS, FILLED_IN, PRESETS, ClipConfig, EditConfig, InputError, Preset, first_line
from tav_opt.contract import ServedClip
from tav_opt.video import Clip

PREVIEWS = 16
"""About as many in an edit."""
NO_CLIP = "No clip is exported yet: tune one, then export it."
EMPTY = '<div class="tav-empty">The clip plays here, and its edits beside it.</div>'
FRAMES = "How many; left empty: as many as the clip has."
AT_ONCE: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
"""Of what does not wait behind edits."""
Updates = dict[Any, Any]
"""By component."""


@dataclass(frozen=True, kw_only=True)
class Rooms:
    """What the page works with."""

    config: AppConfig
    backend: Backend
    sources: ClipSources
    results: KeptResults
    jobs: EditJobs = field(default_factory=EditJobs)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One edit, ready to be sent."""

    clip: str
    served: ServedClip
    edit: EditConfig
    options: Options
    preset: str
    given: dict[str, Any]
    files: str
    """Names of what was dropped in."""


class EditTab:
    """Its components, and what they do."""

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms
        found = controls.of_an_edit()
        self.keeping = [setting for setting in found if setting.name in CONTROL_SETTINGS]
        self.settings = self.keeping + [setting for setting in found if setting not in self.keeping]
        self.fitting = [
            replace(setting, default=None, doc=FRAMES) if setting.name == "frames" else setting
            for setting in controls.of_fields(ClipConfig, FITTING)
        ]
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                self._inputs()
            with gr.Column(scale=7, min_width=320):
                self._outputs()
        self._history()
        self._events()

    # What is on it.

    def _inputs(self) -> None:
        found = names(self.rooms.config)
        first = found[0] if found else None
        self.clip = gr.Dropdown(found, value=first, label="Clip", info="exported clips", elem_id="clip")
        with gr.Accordion("Another video in its place", open=False):
            self.video = gr.Video(sources=["upload"], label="Video", elem_id="edit-video", height=200)
            self.fitting_shown = controls.drawer(self.fitting, prefix="fit")
        self.prompts = gr.Textbox(
            label="Prompts", info="what to draw; one edit a line", lines=2, elem_id="prompts", autofocus=True
        )
        self.negative = gr.Textbox(label="Negative prompt", placeholder="what to stay away from", elem_id="negative")
        self.preset = gr.Radio(list(get_args(Preset)), value="exact", label="Preset", elem_id="preset")
        self.guides = Guides()
        with gr.Accordion("What is kept of the source", open=False, elem_id="keeping"):
            self.shown = controls.drawer(self.keeping, prefix="set")
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            self.shown += controls.drawer(self.settings[len(self.keeping) :], prefix="set")
        with gr.Row():
            self.go = gr.Button("Edit", variant="primary", elem_id="edit", scale=2)
            self.stop = gr.Button("Cancel", elem_id="cancel", scale=1)

    def _outputs(self) -> None:
        self.failure = gr.HTML(elem_id="failure", elem_classes="tav-slot")
        self.status = gr.HTML(elem_id="status")
        self.stage = gr.HTML(EMPTY, elem_id="stage")
        self.which = gr.Radio([], label="Edit", visible=False, elem_id="which")
        with gr.Row():
            self.files = [
                gr.DownloadButton(kind.upper(), size="sm", interactive=False, min_width=80, elem_id=f"download-{kind}")
                for kind in KINDS
            ]

    def _history(self) -> None:
        self.history = gr.BrowserState([], storage_key=edit_history.STORAGE, secret=edit_history.STORAGE)
        with gr.Accordion("Edits made in this browser", open=True):
            self.past = gr.CheckboxGroup([], label="Choose one or two", elem_id="history", elem_classes="tav-history")
            with gr.Row():
                self.see = gr.Button("Show", size="sm", min_width=110, elem_id="see")
                self.again = gr.Button("Use these settings again", size="sm", min_width=110, elem_id="again")
                self.compare = gr.Button("Compare two", size="sm", min_width=110, elem_id="compare")
                self.forget = gr.Button("Forget", size="sm", min_width=110, elem_id="forget")

    def _events(self) -> None:
        showing = [self.stage, self.status, self.failure, self.which, *self.files]
        asked = [self.clip, self.video, self.prompts, self.negative, self.preset, self.history]
        begun = gr.on(
            [self.go.click, self.prompts.submit],
            self.run,
            [*asked, *self.fitting_shown, *self.guides.inputs, *self.shown],
            [*showing, self.history, self.past],
            concurrency_limit=self.rooms.config.at_once,
            show_progress="minimal",
            show_progress_on=self.status,
            trigger_mode="once",
        )
        self.stop.click(self.cancel, None, self.status, **AT_ONCE).then(
            lambda: markup.note("Cancelled."), None, self.status, cancels=[begun], **AT_ONCE
        )
        self.clip.input(self.source, self.clip, [self.stage, self.failure, self.which, *self.files], **AT_ONCE)
        self.which.input(self.show, [self.which, self.history], showing, **AT_ONCE)
        one = [self.past, self.history]
        self.see.click(self.show, one, showing, **AT_ONCE)
        self.compare.click(self.compared, one, showing, **AT_ONCE)
        restored = [self.clip, self.prompts, self.negative, self.preset, *self._drawers]
        self.again.click(self.restored, one, [*restored, self.status, self.failure], **AT_ONCE)
        self.forget.click(self.forgotten, one, [self.history, self.past], **AT_ONCE)

    @property
    def _drawers(self) -> list[Any]:
        """What settings are shown in, but for files."""
        return [*self.fitting_shown, *self.guides.shown, *self.shown]

    def opened(self, clip: str | None, history: Any) -> list[Any]:
        """What `loaded` shows when a browser opens the page: the clips of now, the first one's source, the history."""
        found = names(self.rooms.config)
        chosen = clip if clip in found else (found[0] if found else None)
        shown = self._source(chosen) if chosen else markup.note(NO_CLIP)
        past = gr.CheckboxGroup(edit_history.choices(history), value=[])
        return [gr.Dropdown(found, value=chosen), shown, past]

    @property
    def loaded(self) -> list[Any]:
        """Of `opened`."""
        return [self.clip, self.stage, self.past]

    # What it does.

    def source(self, clip: str | None) -> Updates:
        """The clip plays; the edits of another go."""
        shown = self._source(clip) if clip else EMPTY
        return {self.stage: shown, self.failure: "", self.which: gr.Radio(visible=False), **self._no_files()}

    def _source(self, clip: str) -> str:
        try:
            path = self.rooms.sources.file(clip)
        except InputError:
            return EMPTY  # of a server elsewhere
        return markup.player([markup.Shown(markup.address(path), f"source: {self._caption(clip)}")])

    def _caption(self, clip: str) -> str:
        try:
            return self.rooms.backend.clip(clip).prompt
        except (InputError, ServerError):
            return clip

    def run(
        self,
        request: gr.Request,
        clip: str | None,
        video: str | None,
        prompts: str,
        negative: str,
        preset: str,
        history: Any,
        *shown: Any,
    ) -> Iterator[Updates]:
        """One edit, from its settings to its files; told of on the way."""
        session = str(request.session_hash)
        yield {self.failure: "", self.status: markup.progress("sending"), self.which: gr.Radio(visible=False)}
        try:
            asked = self._asked(clip, video, prompts, negative, preset, shown)
            job = self.rooms.jobs.begin(session, self.rooms.backend.begin(asked.clip, asked.edit, asked.options))
            try:
                for told in job:
                    if isinstance(told, Edit):
                        yield self._done(asked, told, job.seconds, history)
                    else:
                        yield self._under_way(asked, told)
            finally:
                self.rooms.jobs.end(session, job)
        except Exception as error:  # in its own words, in place
            yield self._failed(error)

    def _asked(
        self, clip: str | None, video: str | None, prompts: str, negative: str, preset: str, shown: Sequence[Any]
    ) -> _Asked:
        if not clip:
            raise InputError(NO_CLIP)
        count = len(self.fitting)
        guides_end = count + len(self.guides.inputs)
        fitting = controls.given(self.fitting, shown[:count])
        guided = self.guides.read(*shown[count:guides_end])
        given = controls.given(self.settings, shown[guides_end:])
        if fitting and video is None:
            raise InputError(f"{next(iter(fitting))} is of another video in the clip's place: there is none")
        own = {one.name for one in fields(EditConfig)}
        lines = tuple(line.strip() for line in prompts.splitlines() if line.strip())
        settings = {name: value for name, value in given.items() if name in own}
        edit = EditConfig(prompts=lines, negative_prompt=negative, **settings, **guided.of_edit)
        steps = given.get("steps") or PRESETS.get(preset, {}).get("steps", EditConfig.steps)  # type: ignore[call-overload]
        options: Any = {name: value for name, value in given.items() if name not in own}
        options |= {"preset": preset, "left_out": set(FILLED_IN) - set(settings), "output": "frames"}
        options |= {"preview_interval": max(1, steps // PREVIEWS)}
        served = self.rooms.backend.clip(clip)
        source = Path(video) if video is not None else None
        options = fitted(options | fitting, source, served, mask=guided.mask, began=time.monotonic())
        if guided.maps:
            frames = options.get("source_frames")
            options["maps"] = guided.fitted_maps(
                served.frames if frames is None else len(frames), served, fitting.get("fit", ClipConfig.fit)
            )
        return _Asked(
            clip=clip,
            served=served,
            edit=edit,
            options=options,
            preset=preset,
            given={**fitting, **guided.settings, **given},
            files=", ".join([*([source.name] if source else []), *guided.files]),
        )

    def _under_way(self, asked: _Asked, told: Told) -> Updates:
        if (progress := told.progress) is None:
            waiting = self.rooms.backend.waiting()
            text = f"waiting at the server, where {waiting} requests wait" if waiting else "the clip is being opened"
            return {self.status: markup.progress(f"{text}; {markup.duration(told.seconds)}")}
        stage = markup.STAGES.get(progress.stage, progress.stage)
        text = f"{stage}: step {progress.step} of {progress.steps}"
        found = {self.status: markup.progress(text, progress.step / progress.steps, told.left)}
        if progress.preview is not None:
            found[self.stage] = markup.preview(progress.preview, asked.served.fps, asked.edit.prompts)
        return found

    def _done(self, asked: _Asked, edit: Edit, seconds: float, history: Any) -> Updates:
        kept = self.rooms.results.keep(edit, asked.edit.prompts, self._edited(asked), asked.served.prompt)
        about = {"clip": asked.clip, "negative_prompt": asked.edit.negative_prompt, "preset": asked.preset}
        entries = [
            edit_history.entry(one.key, prompt, seconds, settings=asked.given, files=asked.files, **about)
            for one, prompt in zip(kept, asked.edit.prompts, strict=True)
        ]
        history = edit_history.added(history, entries)
        several = gr.Radio(
            [(prompt, one.key) for one, prompt in zip(kept, asked.edit.prompts, strict=True)],
            value=kept[0].key,
            visible=len(kept) > 1,
        )
        said = (
            f"Done in {markup.duration(seconds)}: {', '.join(_about(edit.metadata[0]))}." if edit.metadata else "Done."
        )
        return {
            **self._showing(kept[0], entries[0]),
            self.status: markup.note(said),
            self.which: several,
            self.history: history,
            self.past: gr.CheckboxGroup(edit_history.choices(history), value=[]),
        }

    def _edited(self, asked: _Asked) -> Clip | None:
        """What the edit was made of, with its sound."""
        frames = asked.options.get("source_frames")
        if frames is not None:
            fps = asked.options.get("fps") or asked.served.fps
            return Clip(frames=frames, fps=fps, sound=asked.options.get("sound"))
        with suppress(InputError):
            return self.rooms.sources.get(asked.clip)
        return None

    def _failed(self, error: Exception) -> Updates:
        if was_cancelled(error):
            return {self.status: markup.note("Cancelled: the edit has stopped.")}
        known = isinstance(error, InputError | ServerError)
        text = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
        return {self.status: "", self.failure: markup.error(text)}

    def cancel(self, request: gr.Request) -> str:
        """Stops the edit that this page waits for, where it runs."""
        stopped = self.rooms.jobs.cancel(str(request.session_hash))
        return markup.note("Cancelled." if stopped is not False else "Cancelled; the server has not stopped yet.")

    # The history.

    def show(self, chosen: str | list[str] | None, history: Any) -> Updates:
        """An edit that was made before, beside its source."""
        keys = [chosen] if isinstance(chosen, str) else chosen or []
        if len(keys) != 1:
            return self._say("Choose one edit to show.")
        kept, entry = self.rooms.results.find(keys[0]), edit_history.find(history, keys[0])
        if kept is None:
            return self._say("That edit's files are not kept any more: use its settings again.")
        return {**self._showing(kept, entry or {}), self.failure: "", self.status: ""}

    def compared(self, chosen: list[str] | None, history: Any) -> Updates:
        """Two edits, one over the other."""
        kept = [self.rooms.results.find(key) for key in chosen or []]
        if len(kept) != 2:
            return self._say(f"Choose two edits to compare; {len(kept)} are chosen.")
        there = [one for one in kept if one is not None]
        if len(there) != 2:
            return self._say("The files of one of them are not kept any more: use its settings again.")
        shown = [self._video(one, edit_history.find(history, one.key) or {}) for one in there]
        hidden = {self.which: gr.Radio(visible=False), **self._no_files()}
        return {self.stage: markup.player(shown), self.failure: "", self.status: "", **hidden}

    def restored(self, chosen: list[str] | None, history: Any) -> Updates:
        """The settings of an edit, where they were given."""
        entry = edit_history.find(history, chosen[0]) if chosen and len(chosen) == 1 else None
        if entry is None:
            return {self.status: markup.note("Choose one edit whose settings to use."), self.failure: ""}
        values = controls.back([*self.fitting, *self.guides.settings, *self.settings], entry["settings"])
        lost = f" It was made with {entry['files']}: drop that in again." if entry.get("files") else ""
        return {
            self.clip: entry["clip"],
            self.prompts: entry["prompt"],
            self.negative: entry["negative_prompt"],
            self.preset: entry["preset"],
            **dict(zip(self._drawers, values, strict=True)),
            self.status: markup.note(f"The settings are back.{lost}"),
            self.failure: "",
        }

    def forgotten(self, chosen: list[str] | None, history: Any) -> tuple[Any, Any]:
        """The history without the chosen ones; their files go when others need the room."""
        left = [one for one in edit_history.checked(history) if one["key"] not in (chosen or [])]
        return left, gr.CheckboxGroup(edit_history.choices(left), value=[])

    def _say(self, text: str) -> Updates:
        return {self.status: markup.note(text), self.failure: ""}

    def _showing(self, kept: Kept, entry: edit_history.Entry) -> Updates:
        videos = [self._video(kept, entry)]
        if kept.source is not None:
            videos.insert(0, markup.Shown(markup.address(kept.source), "source"))
        files = {
            button: gr.DownloadButton(value=str(kept.path(kind)), interactive=True)
            for button, kind in zip(self.files, KINDS, strict=True)
        }
        return {self.stage: markup.player(videos), **files}

    @staticmethod
    def _video(kept: Kept, entry: edit_history.Entry) -> markup.Shown:
        return markup.Shown(markup.address(kept.path("mp4")), str(entry.get("prompt", "edit")))

    def _no_files(self) -> Updates:
        return {button: gr.DownloadButton(value=None, interactive=False) for button in self.files}


def _about(metadata: dict[str, Any]) -> list[str]:
    """What an edit was made with, in few words."""
    told = [f"{metadata['steps']} steps", f"guidance {metadata['guidance_scale']:g}", str(metadata["solver"])]
    return [*told, f"by {metadata['engine']}"]
