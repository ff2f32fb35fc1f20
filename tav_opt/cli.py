"""`tav-opt …`: parses, calls, prints; no logic."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tqdm import tqdm
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg, subcommand

from tav_opt import command
from tav_opt.config import ClipConfig, EditConfig, TrainConfig

if TYPE_CHECKING:
    import numpy as np

    from tav_opt.clips import Clip


REPOSITORY = Path("serving/model_repository")
Dtype = Literal["float32", "float16", "bfloat16"]
Prompts = Annotated[UseAppendAction[tuple[str, ...]], arg(name="prompt", help="What to draw; give it once per edit.")]
Guidance = Annotated[float, arg(name="guidance", help="Classifier-free guidance scale.")]


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Tune a Stable Diffusion model on one clip and one caption; run again after a stop, it goes on where it was."""

    config: Path | None = None
    """YAML file: one of the reference's. The command line comes before it."""
    model: str
    """Stable Diffusion directory or hub id."""
    prompt: str
    """What the clip shows."""
    out: Path = Path("ckpt")
    """Folder of the checkpoint."""
    clip: OmitArgPrefixes[ClipConfig]
    train: OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    device: str = "cpu"
    dtype: Dtype = "float32"
    """Of the frozen weights; what trains is float32."""


@dataclass(frozen=True, kw_only=True)
class Edit(EditConfig):
    """Edit a tuned clip by a prompt, with eager PyTorch."""

    checkpoint: Positional[Path]
    """Folder that `tav-opt tune` wrote."""
    prompts: Prompts = ()
    guidance_scale: Guidance = EditConfig.guidance_scale
    out: Path = Path("edit.mp4")
    """MP4 or GIF file, or a folder for PNGs; several prompts are numbered."""
    base: str | None = None
    """The base model, where it has moved."""
    device: str = "cpu"
    dtype: Dtype = "float32"


@dataclass(frozen=True, kw_only=True)
class Request(EditConfig):
    """Edit an exported clip on a running server, over gRPC."""

    clip: str
    """Name of the exported clip."""
    video: Path | None = None
    """Video file to edit in the clip's place, of its frames and size."""
    url: str = "localhost:8001"
    """Server's gRPC address."""
    deadline: float | None = None
    """Seconds after which the edit is given up."""
    attempts: int = 6
    """How often a request is sent that a server too busy, or not there, never began."""
    tls: bool = False
    """Encrypt the connection; so does each of the next three."""
    root_certificates: Path | None = None
    """PEM file of the authorities to trust."""
    certificate: Path | None = None
    """PEM file of the client's own certificate, and its key."""
    key: Path | None = None
    prompts: Prompts = ()
    guidance_scale: Guidance = EditConfig.guidance_scale
    out: Path = Path("edit.mp4")
    """MP4 file, which the server encodes, GIF file, or a folder for PNGs; several prompts are numbered."""


@dataclass(frozen=True, kw_only=True)
class ListClips:
    """Names, frames, sizes, bases and captions of the exported clips."""

    repository: Path = REPOSITORY


@dataclass(frozen=True, kw_only=True)
class AddClip:
    """Export a tuned clip; where its base is there in its size, its values are copied and no graph is exported."""

    checkpoint: Positional[Path]
    """Folder that `tav-opt tune` wrote."""
    repository: Path = REPOSITORY
    name: str | None = None
    """The clip's name there (the checkpoint folder's)."""
    base: str | None = None
    """The base model, where it has moved."""


@dataclass(frozen=True, kw_only=True)
class RemoveClips:
    """Remove clips, and bases that no clip needs any more."""

    names: Positional[tuple[str, ...]]
    repository: Path = REPOSITORY


@dataclass(frozen=True, kw_only=True)
class VerifyClips:
    """Compare all files of clips, bases and engines with the hashes kept with them; exit status 1 where one differs."""

    repository: Path = REPOSITORY


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Ask a running server for what only a living worker answers."""

    http_url: str = "http://localhost:8000"
    metrics_url: str = "http://localhost:8002/metrics"
    timeout: float = 4.0
    """Seconds after which the worker counts as busy."""


def tune(arguments: Sequence[str]) -> None:
    """Tune a model on one clip and one caption."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    path = early.parse_known_args(arguments)[0].config
    default = _from_yaml(path) if path else tyro.MISSING_NONPROP
    args = tyro.cli(Tune, prog="tav-opt tune", args=arguments, default=default)
    import torch

    from tav_opt import tuning, video

    clip = video.read(
        args.clip.video,
        start=args.clip.start,
        stride=args.clip.stride,
        count=args.clip.frames,
        uniform=args.clip.uniform,
        height=args.clip.height,
        width=args.clip.width,
        fit=args.clip.fit,
    )
    with _bars() as on_progress:
        tuning.tune(
            args.model,
            clip,
            args.prompt,
            args.train,
            args.out,
            device=args.device,
            dtype=getattr(torch, args.dtype),
            source=args.clip,
            on_step=on_progress,
        )
    print(f"checkpoint: {args.out}")


def _from_yaml(path: Path) -> Tune:
    from tav_opt.reference_config import read_reference_config

    found = read_reference_config(path)
    return Tune(config=path, model=found.model, prompt=found.prompt, out=found.out, clip=found.clip, train=found.train)


def edit(arguments: Sequence[str]) -> None:
    """Edit a tuned clip by prompts, with eager PyTorch."""
    args = tyro.cli(Edit, prog="tav-opt edit", args=arguments)
    from tav_opt.files import check_checkpoint

    check_checkpoint(args.checkpoint)
    import torch

    from tav_opt import editing
    from tav_opt.engines.pytorch import open_checkpoint

    editing.check(args)
    engine = open_checkpoint(args.checkpoint, device=args.device, dtype=getattr(torch, args.dtype), base=args.base)
    with _bars() as on_progress:
        frames = editing.edit(engine, args, on_progress=on_progress)
    _write(args.out, frames, engine.info.fps)


def request(arguments: Sequence[str]) -> int:
    """Edit an exported clip on a running server, over gRPC."""
    args = tyro.cli(Request, prog="tav-opt request", args=arguments)
    from tav_opt.client import Client, Retry, ServerError, Tls
    from tav_opt.contract import MAX_VIDEO_BYTES, Output
    from tav_opt.files import read_bytes

    source = None if args.video is None else read_bytes(args.video, MAX_VIDEO_BYTES)
    output: Output = "mp4" if args.out.suffix.lower() == ".mp4" else "frames"
    files = {name: getattr(args, name) for name in ("root_certificates", "certificate", "key")}
    tls = Tls(**files) if args.tls or any(files.values()) else None
    retry = Retry(
        attempts=args.attempts,
        on_pause=lambda why, pause: print(f"tav-opt request: {why}; again in {pause:.1f} s", file=sys.stderr),
    )
    try:
        with Client(args.url, tls=tls, retry=retry) as client, _bars() as on_progress:
            result = client.edit(
                args.clip, args, on_progress=on_progress, deadline_s=args.deadline, video=source, output=output
            )
    except ServerError as error:
        print(f"tav-opt request: {error}", file=sys.stderr)
        return 1
    _write(args.out, result.videos or result.frames, result.fps)
    return 0


def serve(arguments: Sequence[str]) -> int:
    """Start NVIDIA Triton Inference Server on the exported clips."""
    from tav_opt.serving import server, supervisor

    return supervisor.serve(tyro.cli(server.ServeConfig, prog="tav-opt serve", args=arguments))


def probe(arguments: Sequence[str]) -> int:
    """Ask a running server for what only a living worker answers: status 0, or 1 when it edits no more."""
    args = tyro.cli(Probe, prog="tav-opt probe", args=arguments)
    from tav_opt.serving.probe import probe as ask

    health = ask(args.http_url, args.metrics_url, timeout_s=args.timeout)
    print(f"{health.state}: {health.reason}")
    return int(health.state == "dead")


def export(arguments: Sequence[str]) -> int:
    """Export a checkpoint to the server's model repository."""
    from tav_opt.export.__main__ import main as export_main

    return export_main(arguments)


def clips(arguments: Sequence[str]) -> int:
    """List, add, remove or verify exported clips."""
    args = tyro.cli(
        Annotated[ListClips, subcommand("list")]
        | Annotated[AddClip, subcommand("add")]
        | Annotated[RemoveClips, subcommand("remove")]
        | Annotated[VerifyClips, subcommand("verify")],
        prog="tav-opt clips",
        args=arguments,
    )
    from tav_opt import clips

    match args:
        case ListClips():
            for clip in clips.clips(args.repository):
                print(_described(clip))
        case AddClip():
            added = clips.add(args.checkpoint, args.repository, name=args.name, base=args.base)
            how = "with the graphs of its base" if added.graphs else "its base was there"
            print(f"{_described(added.clip)}\nadded in {added.seconds:.1f} s, {how}")
        case RemoveClips():
            for base in clips.remove(args.repository, args.names):
                print(f"base {base}: removed, no clip needs it")
        case VerifyClips():
            problems = clips.verify(args.repository)
            print(*problems or ["all files are as they were written"], sep="\n")
            return 1 if problems else 0
    return 0


def _described(clip: Clip) -> str:
    info = clip.info
    share = f"{clip.size / 1e6:.1f} MB, base {info.exported_base} {clip.base_size / 1e6:.1f} MB"
    return f"{clip.name}: {info.frames} frames of {info.width}×{info.height}, {share}: {info.prompt}"


def demo(arguments: Sequence[str]) -> None:
    """Tune, export, serve and edit one clip, then show the result."""
    from tav_opt.demo import run

    run.run(tyro.cli(run.DemoConfig, prog="tav-opt demo", args=arguments))


def _write(out: Path, edits: np.ndarray | Sequence[bytes], fps: float) -> None:
    """Each edit, of frames or a file, under a name of its own."""
    from tav_opt import video

    for number, edit in enumerate(edits, start=1):
        path = out if len(edits) == 1 else out.with_stem(f"{out.stem}-{number}")
        if isinstance(edit, bytes):
            video.write_encoded(path, edit)
        else:
            video.write(path, edit, fps)
        print(path)


@contextmanager
def _bars() -> Iterator[Callable[..., None]]:
    """One progress bar per stage."""
    bars: dict[str, tqdm] = {}

    def on_progress(stage: str, step: int, total: int, loss: float | None = None) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, initial=step - 1, desc=stage, unit="step", disable=not sys.stderr.isatty())
        bars[stage].update(step - bars[stage].n)
        if loss is not None:
            bars[stage].set_postfix(loss=f"{loss:.4f}", refresh=False)

    try:
        yield on_progress
    finally:
        for bar in bars.values():
            bar.close()


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "demo": demo,
    "tune": tune,
    "edit": edit,
    "export": export,
    "serve": serve,
    "probe": probe,
    "request": request,
    "clips": clips,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return command.run(" ".join(["tav-opt", *arguments[:1]]), lambda: _command(arguments))


def _command(arguments: Sequence[str]) -> int | None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: tav-opt COMMAND …   (tav-opt COMMAND --help tells more)\n")
        for name, function in COMMANDS.items():
            print(f"  {name:9}{function.__doc__}")
        return 0
    if arguments[0] == "--version":
        from tav_opt import __version__

        print(f"tav-opt {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"tav-opt: no command {arguments[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[arguments[0]](arguments[1:])
