"""The package's clips, tuned as the demo tunes them, and the edits that they are judged by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tav_opt import checkpoint, models, tuning, video
from tav_opt.demo import world
from tav_opt.demo.dual_encoder import phrase_of
from tav_opt.demo.emoji import JUDGED
from tav_opt.demo.judge import Judge, frame_difference, outside, track_correlation
from tav_opt.demo.places import PLACES
from tav_opt.demo.run import DemoConfig
from tav_opt.export.exporting import export
from tav_opt.files import read_json
from tav_opt.metrics.clip_scores import frame_consistency, textual_alignment

PACKAGE = Path(models.__file__).parent / "demo"
DEMO = DemoConfig()
AROUND = 1.25
"""Side of the square about the subject's middle that counts as the subject, over the subject's longest side."""

MOST_DB = 100.0
"""Of pictures that are equal."""

EDITS: dict[str, tuple[dict[str, str], ...]] = {
    "leopard": (
        {"subject": "tiger"},
        {"subject": "elephant"},
        {"place": "snow"},
        {"place": "desert"},
        {"style": "sketch"},
        {"subject": "dog", "place": "forest"},
    ),
    "rabbit": (
        {"subject": "cat"},
        {"subject": "sheep"},
        {"place": "snow"},
        {"place": "night"},
        {"style": "watercolour"},
        {"subject": "pig", "place": "beach"},
    ),
    "horse": (
        {"subject": "zebra"},
        {"subject": "camel"},
        {"place": "beach"},
        {"place": "snow"},
        {"style": "grey"},
        {"subject": "cow", "place": "meadow"},
    ),
    "chick": (
        {"subject": "penguin"},
        {"subject": "owl"},
        {"place": "beach"},
        {"place": "sunset"},
        {"style": "pixel"},
        {"subject": "snowman", "place": "snow"},
    ),
}
"""What each clip is turned into: subject, place, style, and two of them at once."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A clip of the package."""

    name: str
    scene: world.Scene
    caption: str
    clip: video.Clip
    track: np.ndarray
    """Middle of the subject (f, 2) in pixels, x and y."""
    scale: float
    """Longest side of the subject as a part of the picture's."""

    @property
    def around(self) -> np.ndarray:
        """Pixels (f-1, H, W) outside the subject."""
        shape = self.clip.frames.shape[1:3]
        return outside(self.track, AROUND * self.scale * shape[0], shape)

    @property
    def beyond(self) -> np.ndarray:
        """Pixels (f, H, W) outside the square about the subject's middle that counts as the subject."""
        _, height, width = self.clip.frames.shape[:3]
        y, x = np.mgrid[:height, :width]
        middle, side = self.track[:, :, None, None], AROUND * self.scale * height
        return np.maximum(abs(x - middle[:, 0]), abs(y - middle[:, 1])) > side / 2

    def edited(self, change: dict[str, str]) -> world.Scene:
        """The scene that an edit shall show."""
        parts = {"subject": self.scene.subject, "place": self.scene.place, "style": self.scene.style}
        return world.Scene(**(parts | change))


def sources() -> Iterator[Source]:
    """Every clip of the package."""
    for entry in read_json(PACKAGE / "clips" / "clips.json"):
        file = PACKAGE / "clips" / entry["file"]
        yield Source(
            name=entry["name"],
            scene=world.Scene(subject=entry["subject"], place=entry["place"]),
            caption=entry["caption"],
            clip=video.read(file, count=entry["frames"], uniform=True, height=world.SIZE, width=world.SIZE),
            track=np.array(entry["track"]),
            scale=entry["scale"],
        )


def tuned(source: Source, folder: Path, **settings: float) -> Path:
    """The clip's checkpoint, tuned with the demo's settings, or others, unless it is there already."""
    if not checkpoint.is_checkpoint(folder):
        tuning.tune(str(PACKAGE / "model"), source.clip, source.caption, replace(DEMO.train, **settings), folder)
    return folder


def exported(source: Source, folder: Path, **settings: Any) -> Path:
    """The clip in the folder's repository, tuned unless it is there already; settings are `export`'s."""
    return export(tuned(source, folder / source.name), folder / "repository", name=source.name, **settings)


def background_psnr(frames: np.ndarray, source: Source) -> float:
    """Of all pixels beyond the subject, in dB."""
    error = np.square(frames.astype(float) - source.clip.frames)[source.beyond].mean()
    return min(MOST_DB, float(10 * np.log10(255**2 / max(error, 1e-9))))


def right_frames(judge: Judge, frames: np.ndarray, source: Source, change: dict[str, str]) -> float:
    """Part of the frames in which the judge finds all that was asked for; the source's own parts are in the choice."""
    right = np.ones(len(frames), bool)
    for part, wanted in change.items():
        names = list(dict.fromkeys([wanted, getattr(source.scene, part), *NAMES[part]]))
        right &= judge.classify(frames, [phrase_of(part, name) for name in names if name != "plain"]) == 0
    return float(right.mean())


NAMES = {"subject": list(JUDGED), "place": list(PLACES), "style": list(world.STYLES)[1:]}


def metrics(judge: Judge, frames: np.ndarray, source: Source, prompt: str) -> dict[str, float]:
    """The paper's metrics by the demo's own encoder, alignment as a plain cosine, and two of motion, of one edit."""
    images, text = judge.encoder.embed_images(frames), judge.encoder.embed_texts(prompt)[0]
    return {
        "frame consistency": frame_consistency(images),
        "textual alignment": textual_alignment(images, text) / 100,
        "track": track_correlation(judge.track(frames), source.track),
        "flicker": frame_difference(frames) - frame_difference(source.clip.frames),
    }


def scores(judge: Judge, frames: np.ndarray, source: Source, change: dict[str, str]) -> dict[str, float]:
    """Whether an edit shows what was asked for, its metrics, and how still it is around the subject."""
    own = frame_difference(source.clip.frames, source.around)
    return {
        "right frames": right_frames(judge, frames, source, change),
        **metrics(judge, frames, source, world.prompt(source.edited(change))),
        "unrest around": frame_difference(frames, source.around) / own,
    }
