"""A clip of 96 frames on the demo's engine for 24: its seams, what it agrees with, its memory.

`python benchmarks/long_clips.py` makes the clip (its subject is fetched from npm once), tunes it on windows, exports it
beside nothing else, and edits it and its first 24 frames by the same graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import apart, header, machine, peak_of

from tav_opt import checkpoint, command, editing, tuning, video, windows
from tav_opt.config import EditConfig
from tav_opt.demo import subjects
from tav_opt.demo.clips import CLIPS, FRAMES, animate
from tav_opt.demo.emoji import FURTHER, JUDGED
from tav_opt.demo.judge import Judge, track_correlation
from tav_opt.demo.run import DEMO, DemoConfig
from tav_opt.engines.registry import open_clip
from tav_opt.export.exporting import export
from tav_opt.files import write_json
from tav_opt.metrics.clip_scores import frame_consistency
from tav_opt.video import contact_sheet

NAME = "long"
FPS = 12


@dataclass(frozen=True, kw_only=True)
class LongClips:
    """Tune a long clip of the demo's world on windows, edit it over windows, and hold it against a short edit."""

    clip: str = "leopard"
    """Of the package's clips, whose subject walks again."""
    times: int = 4
    """How many times as long as those."""
    prompts: tuple[str, ...] = ("a tiger on the beach", "a leopard in the snow")
    steps: int = 20
    """DDIM steps of inversion and of sampling."""
    tuning_steps: int = 200
    folder: Path = Path("long-clips")
    """Where clip, checkpoint, repository and edits are kept."""
    out: Path = Path("benchmarks/results/long_clips.json")


def main(config: LongClips) -> int:
    """Writes the figures of every prompt."""
    frames, track = source(config)
    prepare(config, frames)
    judge, rows = Judge.open(), []
    for number, prompt in enumerate(config.prompts):
        found: dict[str, Any] = {"prompt": prompt}
        for kind, count in (("short", FRAMES), ("long", len(frames))):
            peak, edit = apart(partial(edited, config, prompt, frames[:count]))
            np.save(config.folder / f"{kind}-{number}.npy", edit)
            video.write(config.folder / f"{kind}-{number}.mp4", edit, FPS)
            found[kind] = figures(judge, edit, frames[:count], track[:count]) | {"peak MiB": peak}
        found["peak, long / short"] = found["long"]["peak MiB"] / found["short"]["peak MiB"]
        rows.append(found)
        print(found, flush=True)
    long = [np.load(config.folder / f"long-{number}.npy") for number in range(len(config.prompts))]
    every = slice(0, None, len(frames) // 12)
    sheet = contact_sheet.contact_sheet([x[every] for x in (frames, *long)], [caption(config), *config.prompts])
    video.write_png(config.folder / "long-clips.png", sheet)
    print(header("long clips"))
    write_json(config.out, {"machine": machine(), "frames": len(frames), "window": FRAMES, "edits": rows})
    return 0


def caption(config: LongClips) -> str:
    return next(clip.caption for clip in CLIPS if clip.name == config.clip)


def source(config: LongClips) -> tuple[np.ndarray, np.ndarray]:
    """The clip's frames, and its subject's middle in each."""
    crossing = next(clip for clip in CLIPS if clip.name == config.clip)
    sprites, _ = subjects.animation((JUDGED | FURTHER)[crossing.subject])
    return animate(crossing, sprites, times=config.times)


def prepare(config: LongClips, frames: np.ndarray) -> None:
    """Tunes and exports, unless that is done."""
    ckpt = config.folder / "ckpt"
    if not checkpoint.is_checkpoint(ckpt):
        train = replace(DemoConfig(ddim_steps=config.steps, steps=config.tuning_steps).train, window=FRAMES)
        clip = video.Clip(frames=frames, fps=FPS)
        tuning.tune(str(DEMO / "model"), clip, caption(config), train, ckpt, on_step=told)
    if not (config.folder / "repository").exists():
        export(ckpt, config.folder / "repository", name=NAME)


def told(stage: str, step: int, steps: int, loss: float) -> None:
    if step % 20 == 0:
        print(f"{stage} {step}/{steps} {loss:.4f}", flush=True)


def edited(config: LongClips, prompt: str, frames: np.ndarray) -> tuple[float, np.ndarray]:
    """In a process of its own: the peak of all its memory in MiB, and the edit's frames."""
    engine = open_clip(config.folder / "repository", NAME)
    edit = replace(DemoConfig(ddim_steps=config.steps).edit_config(prompt), prompts=(prompt,))
    assert isinstance(edit, EditConfig)
    return peak_of(lambda: editing.edit(engine, edit, frames=frames)[0])


def figures(judge: Judge, edit: np.ndarray, frames: np.ndarray, track: np.ndarray) -> dict[str, float]:
    """How much an edit's frames agree, how it follows its source, and how much more it changes where windows meet."""
    found = {
        "frame consistency": frame_consistency(judge.encoder.embed_images(edit)),
        "frame consistency of the source": frame_consistency(judge.encoder.embed_images(frames)),
        "track": track_correlation(judge.track(edit), track),
    }
    at = seams(len(edit))
    return found | ({"seams": share(edit, at), "seams of the source": share(frames, at)} if at else {})


def seams(total: int) -> list[int]:
    """Frames from which to the next a window begins or ends."""
    begins = windows.begins(total, FRAMES)
    return sorted(set(begins[1:]) | {begin + FRAMES - 1 for begin in begins[:-1]})


def share(frames: np.ndarray, at: Sequence[int]) -> float:
    """The mean difference of neighbouring frames at these, over that of all others."""
    differences = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean((1, 2, 3))
    return float(differences[list(at)].mean() / np.delete(differences, list(at)).mean())


if __name__ == "__main__":
    sys.exit(command.run("benchmarks/long_clips.py", lambda arguments: main(tyro.cli(LongClips, args=arguments))))
