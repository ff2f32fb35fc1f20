"""The demo's clips: animated subjects that cross a place of the world, as MP4 with captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tav_opt.demo import subjects, world
from tav_opt.demo.emoji import FURTHER, JUDGED
from tav_opt.demo.places import background
from tav_opt.files import whole, write_json

FRAMES = 24
FINE = 4
"""The camera moves by this part of a pixel."""
MARGIN = 2
"""Pixels of scenery beyond each edge."""
SIDE = (world.SIZE + 2 * MARGIN) * FINE
"""Of the scenery, in the camera's steps."""
SWAY, SWAYS = np.array((1.5, 1.0)), np.array((2, 3))
"""How far and how often the hand-held camera sways, sideways and up: pixels, times a clip."""


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """How a subject crosses the picture."""

    name: str
    subject: str
    place: str
    scale: float
    """Longest side of the subject as a part of the picture's."""
    path: tuple[float, float]
    """Where the subject's middle is at the start and at the end, as a part of the width."""
    hops: int = 0
    """Arcs on the way."""

    @property
    def caption(self) -> str:
        """The prompt that the clip is tuned with."""
        return world.prompt(world.Scene(subject=self.subject, place=self.place))


CLIPS = (
    Crossing(name="leopard", subject="leopard", place="beach", scale=0.62, path=(0.68, 0.32)),
    Crossing(name="rabbit", subject="rabbit", place="forest", scale=0.6, path=(0.7, 0.3), hops=3),
    Crossing(name="horse", subject="horse", place="desert", scale=0.64, path=(0.67, 0.33)),
    Crossing(name="chick", subject="chick", place="meadow", scale=0.6, path=(0.68, 0.32), hops=4),
)
"""The rabbit stands out from its place: of the same hops in the snow its edit by night kept nothing (the tracks'
correlation was -0.11, and 0.99 from the forest)."""


def animate(
    crossing: Crossing, sprites: list[Image.Image], *, seed: int = 0, times: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 (f, H, W, 3) of a subject before a place, by a hand-held camera, and its middle (f, 2), x and y.

    The middle is in pixels. The sprites are frames of one animation, all of one size, which is seen so many `times`,
    FRAMES each.
    """
    scenery = background(crossing.place, np.random.default_rng(seed), SIDE)
    frames, track = [], []
    for sprite, (x, y), camera in _walk(crossing, sprites, seed, times):
        frames.append(np.asarray(_seen(world.paste(scenery, sprite, x, y), camera)))
        track.append((np.array((x + sprite.width / 2, y + sprite.height / 2)) - camera) / FINE)
    return np.stack(frames), np.array(track)


def silhouettes(crossing: Crossing, sprites: list[Image.Image], *, seed: int = 0) -> np.ndarray:
    """Of the same clip where its subject is: uint8 (f, H, W, 3), 255 there and 0 elsewhere."""
    drawn = [
        np.asarray(_seen(Image.fromarray(world.silhouette(sprite, x, y, (SIDE, SIDE))), camera))
        for sprite, (x, y), camera in _walk(crossing, sprites, seed, 1)
    ]
    return np.where(np.stack(drawn)[..., None].repeat(3, -1) > 127, np.uint8(255), np.uint8(0))


def _walk(
    crossing: Crossing, sprites: list[Image.Image], seed: int, times: int
) -> Iterator[tuple[Image.Image, tuple[int, int], np.ndarray]]:
    """In each frame the subject, its left and top in the scenery, and the camera's."""
    box = world.visible(*sprites)
    for index, camera in enumerate(_camera(seed, times)):
        part = index / (times * FRAMES - 1)
        sprite = sprites[index % FRAMES * len(sprites) // FRAMES].crop(box)
        longest = crossing.scale * world.SIZE * FINE
        sprite = world.fit(sprite, longest)
        middle = MARGIN + (crossing.path[0] + (crossing.path[1] - crossing.path[0]) * part) * world.SIZE
        foot = MARGIN + (0.92 - 0.1 * abs(np.sin(np.pi * crossing.hops * part))) * world.SIZE
        yield sprite, (round(middle * FINE - sprite.width / 2), round(foot * FINE - sprite.height)), camera


def _seen(scenery: Image.Image, camera: np.ndarray) -> Image.Image:
    left, top = (int(at) for at in camera)
    seen = scenery.crop((left, top, left + world.SIZE * FINE, top + world.SIZE * FINE))
    return seen.resize((world.SIZE, world.SIZE), Image.Resampling.BOX)


def _camera(seed: int, times: int) -> np.ndarray:
    """Left and top (f, 2) of what the camera sees: it sways, since nothing else moves about the subject."""
    turns = np.linspace(0, times, times * FRAMES)[:, None] * SWAYS + np.random.default_rng((seed, 1)).random(2)
    return np.round((MARGIN + SWAY * np.sin(2 * np.pi * turns)) * FINE).astype(int)


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """Frames uint8 (f, H, W, 3) as H.264, near to lossless."""
    with whole(path) as temporary, av.open(str(temporary), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "preset": "slow"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def make_clips(folder: Path, cache: Path = subjects.CACHE) -> None:
    """Writes every clip as MP4, and `clips.json` with captions, frames per second and tracks."""
    entries = []
    for crossing in CLIPS:
        sprites, rate = subjects.animation((JUDGED | FURTHER)[crossing.subject], cache)
        fps = max(1, round(rate * FRAMES / len(sprites)))
        frames, track = animate(crossing, sprites)
        write_mp4(folder / f"{crossing.name}.mp4", frames, fps)
        entries.append(
            {"file": f"{crossing.name}.mp4", "caption": crossing.caption, "frames": FRAMES, "fps": fps}
            | asdict(crossing)
            | {"track": track.tolist()}
        )
    write_json(folder / "clips.json", entries)
