"""The second tab: a video and a caption in; what it will take, how the loss falls, previews; then the export."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr

from tav_opt import video
from tav_opt.app import controls, markup
from tav_opt.app.app_config import AppConfig
from tav_opt.app.edit_tab import AT_ONCE, Updates
from tav_opt.app.tuner import CHECKPOINT
from tav_opt.app.tuning_estimate import SUITED, estimate, suited
from tav_opt.app.tuning_runs import Told, TuningRuns
from tav_opt.config import ClipConfig, InputError, TrainConfig, check_numbers, first_line

FIRST = ("steps", "lr", "preview_every", "preview_prompts")
"""Settings of tuning that stand in the open."""
PREVIEWS = 4
"""The newest, on the page."""
CHOSEN = {"start", "stride", "frames", "uniform", "fit", "height", "width"}
"""Settings of the clip; of them the frames that are shown depend."""


class TuneTab:
    """Its components, and what they do; `on_export` tells the other tabs of a new clip."""

    def __init__(self, config: AppConfig, runs: TuningRuns) -> None:
        self.config, self.runs = config, runs
        self.clip_settings = controls.of_fields(ClipConfig, CHOSEN, of_model=SUITED)
        self.train_settings = controls.of_fields(TrainConfig, FIRST, of_model=SUITED)
        self.more_settings = controls.of_fields(TrainConfig, without=FIRST)
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                self._inputs()
            with gr.Column(scale=6, min_width=320):
                self._outputs()
        self.timer = gr.Timer(1.0, active=False)
        self._events()

    def _inputs(self) -> None:
        models = list(self.config.offered_models)
        labels = [(Path(one).name if Path(one).is_dir() else one, one) for one in models]
        self.video = gr.Video(sources=["upload"], label="Video", elem_id="tune-video", height=220)
        self.caption = gr.Textbox(label="Caption", placeholder="what the video shows", elem_id="caption")
        with gr.Row():
            self.name = gr.Textbox(label="Name", placeholder="a-z, 0-9, _ and -", elem_id="run-name", min_width=150)
            self.model = gr.Dropdown(labels, value=models[0], label="Base model", elem_id="model", min_width=150)
        with gr.Accordion("Frames and size", open=True):
            self.clip_shown = controls.drawer(self.clip_settings, prefix="clip")
        self.frames = gr.HTML(elem_id="frames", elem_classes="tav-slot")
        self.needed = gr.HTML(elem_id="needed", elem_classes="tav-slot")
        self.train_shown = controls.drawer(self.train_settings, prefix="train")
        with gr.Accordion("Advanced", open=False):
            self.more_shown = controls.drawer(self.more_settings, prefix="train")
        self.begin = gr.Button("Tune", variant="primary", elem_id="tune")

    def _outputs(self) -> None:
        self.run = gr.Dropdown(self.runs.names(), value=None, label="Run", elem_id="run")
        with gr.Row():
            self.stop = gr.Button("Stop", elem_id="tune-stop", min_width=80)
            self.go_on = gr.Button("Go on", elem_id="go-on", min_width=80)
        self.failure = gr.HTML(elem_id="tune-failure", elem_classes="tav-slot")
        self.status = gr.HTML(elem_id="tune-status", elem_classes="tav-slot")
        self.loss = gr.LinePlot(x="step", y="loss", height=230, label="Loss", elem_id="loss", buttons=[])
        self.previews = gr.HTML(elem_id="previews", elem_classes="tav-slot")
        self.export = gr.Button("Export: edit it on the first tab", elem_id="export")
        self.exported = gr.HTML(elem_id="exported", elem_classes="tav-slot")

    def _events(self) -> None:
        told = [self.status, self.failure, self.loss, self.previews, self.timer]
        train = [*self.train_shown, *self.more_shown]
        shown: list[Any] = [self.video, self.model, *self.clip_shown, *train]
        gr.on(
            [one.blur if isinstance(one, gr.Textbox) else one.change for one in shown],
            self.looked_at,
            shown,
            [self.frames, self.needed],
            trigger_mode="multiple",
            concurrency_limit=1,  # one after the other: the last one's answer stays
            show_progress="hidden",
        )
        self.video.change(self.named, [self.video, self.name], self.name, **AT_ONCE)
        self.begin.click(self.begun, [self.caption, self.name, *shown], [self.run, *told, self.begin], **AT_ONCE)
        self.timer.tick(self.watched, self.run, told, **AT_ONCE)
        self.run.change(self.watched, self.run, told, **AT_ONCE)
        self.stop.click(self.stopped, self.run, told, **AT_ONCE)
        self.go_on.click(self.gone_on, self.run, told, **AT_ONCE)

    def exports(self, clip: Any, clips: Callable[[str], Any]) -> None:
        """The export tells the first tab's choice of clips of the new one."""

        def export(run: str | None) -> Iterator[Updates]:  # Gradio looks at the function for what it yields
            yield from self.export_it(run, clip, clips)

        self.export.click(
            export,
            self.run,
            [self.exported, clip],
            concurrency_limit=1,
            show_progress="hidden",
        )

    # Before the start.

    def named(self, path: str | None, name: str) -> str:
        """A name for the run, of the video's."""
        if name or not path:
            return name
        return re.sub(r"[^a-z0-9_-]+", "-", Path(path).stem.lower()).strip("-_")[:40]

    def _read(self, path: str | None, model: str, shown: Sequence[Any]) -> tuple[ClipConfig, TrainConfig]:
        """What is given; for the rest what suits the model, or else the paper's."""
        if path is None:
            raise InputError("no video: drop one in")
        if model not in self.config.offered_models:
            raise InputError(f"model {model!r} is not offered here")
        settings = [*self.clip_settings, *self.train_settings, *self.more_settings]
        found = {**suited(model), **controls.given(settings, shown)}
        clip = {name: value for name, value in found.items() if name in CHOSEN}
        train = {name: value for name, value in found.items() if name not in CHOSEN}
        configs = ClipConfig(video=Path(path), **clip), TrainConfig(**train)
        for config in configs:
            check_numbers(config)
        return configs

    def looked_at(self, path: str | None, model: str, *shown: Any) -> tuple[str, str]:
        """The frames that are taken, and the memory that they take."""
        if path is None:
            return "", ""
        try:
            clip, train = self._read(path, model, shown)
            taken = video.read(clip)
            text, fits = estimate(model, train, clip.frames, clip.height, clip.width)
            usual = ", ".join(f"{name} {controls.words(value)}" for name, value in suited(model).items())
            text += f" Where nothing is given: {usual}." if usual else ""
        except Exception as error:
            return "", markup.error(_said(error))
        step = 1 if clip.uniform else clip.stride
        first = 1 if clip.uniform else clip.start
        numbers = range(first, first + step * len(taken.frames), step)
        return markup.thumbnails(taken.frames, numbers), markup.note(text) if fits else markup.error(text)

    # The run.

    def begun(self, caption: str, name: str, path: str | None, model: str, *shown: Any) -> Updates:
        """A new run, which is watched from now on."""
        from tav_opt import tuning

        try:
            clip, train = self._read(path, model, shown)
            tuning.check(train, caption)
            self.runs.begin(name.strip(), clip.video, _written(caption, model, clip, train))
        except Exception as error:
            return {self.failure: markup.error(_said(error))}
        run = gr.Dropdown(self.runs.names(), value=name.strip())
        return {**self._told(name.strip()), self.run: run, self.timer: gr.Timer(active=True)}

    def watched(self, name: str | None) -> Updates:
        """How far a run is."""
        return self._told(name) if name else {self.timer: gr.Timer(active=False)}

    def stopped(self, name: str | None) -> Updates:
        """The run ends after its present step, and keeps its state."""
        if name:
            self.runs.stop(name)
        return self.watched(name)

    def gone_on(self, name: str | None) -> Updates:
        """A run that was stopped goes on where it was."""
        if not name:
            return {self.failure: markup.error("Choose a run to go on with.")}
        try:
            self.runs.go_on(name)
        except InputError as error:
            return {self.failure: markup.error(str(error))}
        return {**self._told(name), self.timer: gr.Timer(active=True)}

    def _told(self, name: str) -> Updates:
        import pandas as pd

        told = self.runs.told(name)
        table = pd.DataFrame(told.losses, columns=["step", "loss"])
        failure = markup.error(told.error) if told.state == "failed" else ""
        return {
            self.status: _line(told),
            self.failure: failure,
            self.loss: table if len(table) else None,
            self.previews: markup.pictures(self.runs.previews(name)[:PREVIEWS]),
            self.timer: gr.Timer(active=told.state == "running"),
        }

    def opened(self) -> Any:
        """What `run` shows when a browser opens the page: the run that is under way, if one is."""
        found = self.runs.names()
        running = next((name for name in found if self.runs.is_running(name)), None)
        return gr.Dropdown(found, value=running or (found[0] if found else None))

    # The export.

    def export_it(self, name: str | None, clip: Any, clips: Callable[[str], Any]) -> Iterator[Updates]:
        """The tuned clip in the repository, under the run's name."""
        if not name or self.runs.told(name).state != "done":
            yield {self.exported: markup.error("Choose a run that is done.")}
            return
        command = [sys.executable, "-m", "tav_opt.export", str(self.runs.folder(name) / CHECKPOINT)]
        command += ["--repository", str(self.config.repository), "--name", name]
        yield {self.exported: markup.progress("exporting: the base's graphs first, where it is not there yet")}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            last = ""
            for line in process.stdout:
                last = line.strip() or last
                yield {self.exported: markup.progress(f"exporting: {last}")}
        if process.returncode:
            yield {self.exported: markup.error(last)}
            return
        yield {self.exported: markup.note(f"{name} is exported: edit it on the first tab."), clip: clips(name)}


def _written(caption: str, model: str, clip: ClipConfig, train: TrainConfig) -> dict[str, Any]:
    """What a run is told, as JSON."""
    own = {one.name: getattr(clip, one.name) for one in fields(ClipConfig) if one.name != "video"}
    return {
        "caption": caption.strip(),
        "model": model,
        "clip": own,
        "train": {one.name: getattr(train, one.name) for one in fields(TrainConfig)},
    }


def _line(told: Told) -> str:
    loss = f", loss {told.losses[-1][1]:.4f}" if told.losses else ""
    if told.state == "running":
        if not told.step or not told.steps:
            return markup.progress("loading the model")
        stage = markup.STAGES.get(told.stage, told.stage)
        text = f"{stage}: step {told.step} of {told.steps}{loss}"
        return markup.progress(text, told.step / told.steps, told.left)
    if told.state == "done":
        return markup.note(f"Tuned{loss}. Export it to edit it.")
    if told.state == "stopped":
        after = f" after step {told.losses[-1][0]}" if told.losses else ""
        return markup.note(f"Stopped{after}: “Go on” goes on from there.")
    return ""


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
