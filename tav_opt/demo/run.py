"""`tav-opt demo`: one clip tuned, exported, served by Triton and edited over gRPC, with pictures of the result."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tav_opt import editing, progress, tuning, video
from tav_opt.base.directory import Base
from tav_opt.client import Client
from tav_opt.config import (
    ClipConfig,
    Control,
    Count,
    DdimSteps,
    EditConfig,
    EngineName,
    GuidanceScale,
    InputError,
    LearningRate,
    Side,
    TrainConfig,
    check_numbers,
)
from tav_opt.contract import ClipInfo, edit_metadata
from tav_opt.demo import ways
from tav_opt.demo.random_model import write_random_model
from tav_opt.engines.onnxruntime import load_onnxruntime
from tav_opt.engines.registry import open_clip
from tav_opt.export.exporting import export
from tav_opt.files import DESCRIPTION, check_place, read_json
from tav_opt.serving.host.serve_config import ServeConfig
from tav_opt.serving.host.server import Server
from tav_opt.serving.host.tritonserver import find_tritonserver
from tav_opt.video import contact_sheet

DEMO = Path(__file__).parent
CLIP_NAME = "demo"
EDITS = ("a tiger on the beach", "a leopard in the snow")
"""Of the package's first clip, a leopard on the beach: another subject, another place."""
SMALL_LR, SMALL_GUIDANCE = 1e-3, 2.5
"""Of 24 edits (benchmarks/crossings.py) after 150 steps the subjects' tracks correlated with the source's by 0.85 at a
guidance of 3 and 0.87 at 2, and 94 and 92 % of the frames were right; after 200 steps, with another clip of the rabbit,
by 0.91 at 2.5, and 95 %. With earlier weights, at a guidance of 3, the leopard's tracks were 0.85 at 3e-4 and 0.88 at
1e-3; the rabbit's at 3e-3 were worse again."""

CONTROL, WAY = "place", "there and back"
"""The adapter's name, and where `--control` sends the subject."""
CONTROL_SCALE = 1.5
"""Of the adapter; chosen by the trials of benchmarks/controlled.py."""
Maps = Mapping[str, np.ndarray]
Editor = Callable[[EditConfig, Maps, progress.OnProgress], tuple[np.ndarray, EngineName]]
"""Edits the exported clip along maps, if any, telling of its steps → uint8 (prompts, f, H, W, 3), and the engine that
did."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Tune, export, serve and edit one clip, then show source and edits side by side."""

    video: Path | None = None
    """Your own clip; default: one of the package's."""
    prompt: str | None = None
    """What the clip shows."""
    edit: tuple[str, ...] = ()
    """Prompts of the edits."""
    model: str | None = None
    """Stable Diffusion directory or hub id; default: the package's small model."""
    out: Path = Path("demo-out")
    frames: Count = 24
    size: Side | None = None
    """Pixels of a side; default: the model's own."""
    steps: Count = 200
    """Tuning steps."""
    lr: LearningRate | None = None
    """Of tuning; default: the paper's 3e-5 for a model of yours, 1e-3 for the package's small one."""
    ddim_steps: DdimSteps = 50
    guidance: GuidanceScale | None = None
    """Default: 7.5 for a model of yours, 2.5 for the package's."""
    control: bool = False
    """Edit once more along a drawn way that the clip does not go, by the adapter that ships with the small model."""
    in_process: bool = False
    """Run the exported model in this process instead of the server."""

    def edit_config(self, *prompts: str) -> EditConfig:
        """How the clip is edited."""
        guidance = self.guidance if self.guidance is not None else SMALL_GUIDANCE if self.model is None else 7.5
        return EditConfig(
            prompts=prompts, steps=self.ddim_steps, inversion_steps=self.ddim_steps, guidance_scale=guidance
        )

    def controlled(self, prompt: str) -> EditConfig:
        """The same along a drawn way; what the inverted latents hold of the source's is outweighed."""
        return replace(self.edit_config(prompt), controls=(Control(name=CONTROL, scale=CONTROL_SCALE),))

    @property
    def train(self) -> TrainConfig:
        """How the clip is tuned."""
        lr = self.lr if self.lr is not None else SMALL_LR if self.model is None else TrainConfig.lr
        return TrainConfig(steps=self.steps, lr=lr, inversion_steps=self.ddim_steps)


@dataclass(frozen=True, kw_only=True)
class _Subject:
    video: Path
    prompt: str
    edits: tuple[str, ...]


def run(config: DemoConfig) -> None:
    """Does it all and prints where the results are; raises InputError for settings that cannot work."""
    subject = _subject(config)
    check_numbers(config)
    tuning.check(config.train, subject.prompt)
    editing.check(config.edit_config(*subject.edits))
    if config.control and config.model is not None:
        raise InputError(f"--control is for the package's own model, not {config.model}: its adapter is of that one")
    check_place(config.out / ".demo")
    load_onnxruntime()  # what export and server lack is said before minutes of tuning
    if not config.in_process:
        find_tritonserver()
    if config.out.exists() and not (config.out / ".demo").exists() and any(config.out.iterdir()):
        raise InputError(f"{config.out} holds other files; choose another --out")
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / ".demo").touch()
    shutil.rmtree(
        config.out / "ckpt", ignore_errors=True
    )  # the exported base stays: the next demo need not wait for it
    model = _model(config)
    clip = _read(config, subject, model)
    seconds: dict[str, float] = {}
    with _timed("tune", seconds) as on_progress:
        tuning.tune(model, clip, subject.prompt, config.train, config.out / "ckpt", on_step=on_progress)
    with _timed("export", seconds) as on_progress:
        adapters = {CONTROL: DEMO / "control"} if config.control else {}
        repository = config.out / "model_repository"
        export(config.out / "ckpt", repository, name=CLIP_NAME, adapters=adapters, on_progress=on_progress)
    info = ClipInfo.from_json(read_json(config.out / "ckpt" / DESCRIPTION))
    edits = []
    with _editor(config, seconds) as edit:
        for number, prompt in enumerate(subject.edits, start=1):
            with _timed(f"edit {number}", seconds) as on_progress:
                frames, engine = edit(config.edit_config(prompt), {}, on_progress)
                edits.append(frames[0])
        if config.control:
            _controlled(config, subject, clip, info, edit, seconds)
    metadata = edit_metadata(info, CLIP_NAME, config.edit_config(*subject.edits), subject.edits, engine=engine)
    _show(config.out, [clip.frames, *edits], [subject.prompt, *subject.edits], clip.fps, metadata)
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    print(f"in a browser: {_command()} app --in-process --repository {config.out / 'model_repository'}")


def _controlled(
    config: DemoConfig,
    subject: _Subject,
    clip: video.Clip,
    info: ClipInfo,
    edit: Editor,
    seconds: dict[str, float],
) -> None:
    """The first edit along a drawn way, beside its maps: `controlled.*`."""
    prompt, (count, side) = subject.edits[0], clip.frames.shape[:2]
    way, asked = ways.along(ways.WAYS[WAY], count, side), config.controlled(prompt)
    with _timed("edit along a drawn way", seconds) as on_progress:
        frames, engine = edit(asked, {CONTROL: way}, on_progress)
    metadata = edit_metadata(info, CLIP_NAME, asked, (prompt,), engine=engine)
    clips, captions = [clip.frames, way, frames[0]], [subject.prompt, WAY, prompt]
    _show(config.out, clips, captions, clip.fps, metadata, names=("controlled", "controlled"))


def _command() -> str:
    """This program, as a shell finds it."""
    return "tav-opt" if shutil.which("tav-opt") else sys.argv[0]


def _model(config: DemoConfig) -> str:
    if config.model is not None:
        return config.model
    if (DEMO / "model").is_dir():
        print("model: the package's own small one; for real pictures give --model and a Stable Diffusion")
        return str(DEMO / "model")
    print("model: a RANDOM one made on the spot: the path is the real one, the pictures are noise")
    return str(write_random_model(config.out / "random-model"))


def _subject(config: DemoConfig) -> _Subject:
    if config.video is None:
        if config.prompt is not None:
            raise InputError(f"prompt {config.prompt!r} is given without --video")
        first = read_json(DEMO / "clips" / "clips.json")[0]
        return _Subject(video=DEMO / "clips" / first["file"], prompt=first["caption"], edits=config.edit or EDITS)
    if config.prompt is None or not config.edit:
        raise InputError(f"--video {config.video} needs --prompt (what it shows) and --edit (what it shall show)")
    return _Subject(video=config.video, prompt=config.prompt, edits=config.edit)


def _read(config: DemoConfig, subject: _Subject, model: str) -> video.Clip:
    size = config.size or Base.at(model).native_size
    clip = video.read(ClipConfig(video=subject.video, frames=config.frames, uniform=True, height=size, width=size))
    return clip if clip.fps <= 12 else replace(clip, fps=12.0, sound=None)  # slower than its sound


@contextmanager
def _editor(config: DemoConfig, seconds: dict[str, float]) -> Iterator[Editor]:
    """The real server and a client of it; or the same engine in this process."""
    repository = config.out / "model_repository"
    if config.in_process:
        engine = open_clip(repository, CLIP_NAME)

        def here(edit: EditConfig, followed: Maps, on_progress: progress.OnProgress) -> tuple[np.ndarray, EngineName]:
            return editing.edit(engine, edit, maps=followed, on_progress=on_progress), engine.kind

        yield here
        return
    with ExitStack() as stack:
        with _timed("start of the server", seconds):
            free = ServeConfig(repository=repository, grpc_port=0, http_port=0, metrics_port=0)
            server = stack.enter_context(Server(free))
        client = stack.enter_context(Client(server.grpc_url))

        def edited(edit: EditConfig, followed: Maps, on_progress: progress.OnProgress) -> tuple[np.ndarray, EngineName]:
            found = client.edit(CLIP_NAME, edit, maps=followed, on_progress=on_progress)
            return found.frames, found.metadata[0]["engine"]

        yield edited


def _show(
    out: Path,
    clips: list[np.ndarray],
    captions: list[str],
    fps: float,
    metadata: dict[str, Any],
    names: tuple[str, str] = ("side-by-side", "contact-sheet"),
) -> None:
    """Source and edits as MP4 and GIF side by side, and as a contact sheet."""
    together = contact_sheet.side_by_side(clips, captions)
    for kind in (".mp4", ".gif"):
        video.write(out / f"{names[0]}{kind}", together, fps, metadata)
    video.write_png(out / f"{names[1]}.png", contact_sheet.contact_sheet(clips, captions), metadata)
    for name in (f"{names[0]}.mp4", f"{names[0]}.gif", f"{names[1]}.png"):
        print(out / name)


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[progress.OnProgress]:
    print(f"{name} …", flush=True)
    start = time.perf_counter()
    with progress.shown(leave=False) as on_progress:
        yield on_progress
    seconds[name] = time.perf_counter() - start
