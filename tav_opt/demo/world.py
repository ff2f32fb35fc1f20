"""The demo's world: a subject in a place in a style, as a picture and as a caption; some combinations are held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from tav_opt.demo.emoji import JUDGED
from tav_opt.demo.places import PLACES, background
from tav_opt.demo.subjects import MOVING

SIZE = 64
"""Pixels of a side."""
SCALES = (0.58, 0.9)
"""Longest side of the subject as a part of the picture's."""
ROTATION = 8.0
"""Degrees to either side."""
STYLES: dict[str, tuple[str, ...]] = {
    "plain": ("",),
    "sketch": ("pencil sketch", "as a pencil sketch"),
    "pixel": ("pixel art", "as pixel art"),
    "watercolour": ("watercolour painting", "as a watercolour"),
    "grey": ("black and white", "in black and white"),
}
"""Each style with the phrases that captions use for it, the usual one first."""
JUDGED_WEIGHT, MOVING_WEIGHT = 8, 24
"""How often a judged subject, and one of the clips, is drawn for each time that another one is."""
MIRROR_SHARE = 0.1
"""Part of the pictures with the subject mirrored: emoji look left, and a small model that saw as many look right drew
animals with two heads."""
PLAIN_STYLE_SHARE = 0.6
"""Part of the pictures without a style: subjects are learned from these first."""
EMPTY_SHARE = 0.1
"""Part of the captions that are empty, for guidance."""
DROP_SHARE = 0.1
"""Part of the captions without the place, or without the style."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows."""

    subject: str
    place: str
    style: str = "plain"


def held_out(scene: Scene, subjects: Sequence[str]) -> bool:
    """Whether a combination is kept from training: a tenth of them, by a rule over the parts' positions."""
    position = subjects.index(scene.subject) + 3 * list(PLACES).index(scene.place) + 7 * list(STYLES).index(scene.style)
    return position % 10 == 0


def draw_scene(rng: np.random.Generator, subjects: Sequence[str], *, kept_out: bool = False) -> Scene:
    """A random combination: one that may be trained on, or with `kept_out` one that may not."""
    weights = np.array([_weight(subject) for subject in subjects], float)
    while True:
        plain = rng.random() < PLAIN_STYLE_SHARE
        scene = Scene(
            subject=str(rng.choice(subjects, p=weights / weights.sum())),
            place=str(rng.choice(list(PLACES))),
            style="plain" if plain else str(rng.choice(list(STYLES)[1:])),
        )
        if held_out(scene, subjects) == kept_out:
            return scene


def _weight(subject: str) -> int:
    return MOVING_WEIGHT if subject in MOVING else JUDGED_WEIGHT if subject in JUDGED else 1


def prompt(scene: Scene) -> str:
    """The usual caption of a scene, with all its parts."""
    style = STYLES[scene.style][0]
    return f"{subject_phrase(scene.subject)} {PLACES[scene.place][0]}" + (f", {style}" if style else "")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as training uses it: phrases vary, parts are dropped, and a tenth is empty."""
    if rng.random() < EMPTY_SHARE:
        return ""
    words = subject_phrase(scene.subject) if rng.random() < 0.8 else f"the {scene.subject}"
    if rng.random() > DROP_SHARE:
        words += f" {rng.choice(PLACES[scene.place])}"
    style = str(rng.choice(STYLES[scene.style]))
    return f"{words}, {style}" if style and rng.random() > DROP_SHARE else words


def subject_phrase(subject: str) -> str:
    """The subject with its article."""
    return f"{'an' if subject[0] in 'aeiou' else 'a'} {subject}"


def compose(
    scene: Scene, sprites: Mapping[str, Sequence[Image.Image]], rng: np.random.Generator, size: int = SIZE
) -> np.ndarray:
    """A picture of the scene, uint8 (size, size, 3): the subject scaled, mirrored, turned and placed at random."""
    return compose_at(scene, sprites, rng, size)[0]


def compose_at(
    scene: Scene, sprites: Mapping[str, Sequence[Image.Image]], rng: np.random.Generator, size: int = SIZE
) -> tuple[np.ndarray, tuple[float, float]]:
    """The same picture, and the middle of the visible subject in pixels, x and y."""
    composite = compose_whole(scene, sprites, rng, size)
    return composite.picture, composite.middle


@dataclass(frozen=True, kw_only=True)
class Composite:
    """A picture of a scene, and where its subject is."""

    picture: np.ndarray
    """uint8 (size, size, 3)."""
    middle: tuple[float, float]
    """Of the visible subject, in pixels, x and y."""
    silhouette: np.ndarray
    """uint8 (size, size): 255 where the subject is, 0 elsewhere."""


def compose_whole(
    scene: Scene, sprites: Mapping[str, Sequence[Image.Image]], rng: np.random.Generator, size: int = SIZE
) -> Composite:
    """The same picture with all that is known of it."""
    pictures = sprites[scene.subject]
    # The still is the subject as the caption means it; poses of an animation follow it.
    pose = int(rng.integers(len(pictures))) if rng.random() < 0.7 else 0
    sprite = fit(pictures[pose], rng.uniform(*SCALES) * size)
    if rng.random() < MIRROR_SHARE:
        sprite = ImageOps.mirror(sprite)
    sprite = sprite.rotate(rng.uniform(-ROTATION, ROTATION), Image.Resampling.BICUBIC, expand=True)
    room = np.maximum(0, size - np.array(sprite.size))
    x = round((size - sprite.size[0]) / 2 + rng.uniform(-0.5, 0.5) * room[0] * 1.2)
    y = round((size - sprite.size[1]) - rng.uniform(0, 0.6) * room[1])
    picture = paste(background(scene.place, rng, size), sprite, x, y)
    left, top, right, bottom = visible(sprite)
    return Composite(
        picture=apply_style(picture, scene.style),
        middle=(x + (left + right) / 2, y + (top + bottom) / 2),
        silhouette=silhouette(sprite, x, y, (size, size)),
    )


def silhouette(sprite: Image.Image, x: int, y: int, size: tuple[int, int]) -> np.ndarray:
    """Where a sprite at (x, y) covers a picture of this width and height: uint8 (H, W), 255 there and 0 elsewhere."""
    alpha = Image.new("L", size)
    alpha.paste(sprite.getchannel("A"), (x, y))
    return np.where(np.asarray(alpha) > 127, np.uint8(255), np.uint8(0))


def visible(*sprites: Image.Image) -> tuple[int, int, int, int]:
    """The box of what is visible in any of the sprites, which are of one size: left, top, right, bottom."""
    opaque = np.any([np.asarray(sprite.getchannel("A")) > 16 for sprite in sprites], axis=0)
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def fit(sprite: Image.Image, longest: float) -> Image.Image:
    """The sprite scaled so that its longest side has so many pixels."""
    factor = longest / max(sprite.size)
    size = tuple(max(1, round(side * factor)) for side in sprite.size)
    return sprite.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)  # type: ignore[arg-type]


def paste(picture: Image.Image, sprite: Image.Image, x: int, y: int) -> Image.Image:
    """The sprite over the picture at (x, y), with a soft shadow under its feet."""
    width, height = sprite.size
    shadow = Image.new("L", picture.size)
    foot = y + height
    flat = max(2, height // 10)
    shadow.paste(90, (x + width // 8, foot - flat, x + width - width // 8, foot + flat // 2))
    shadow = shadow.filter(ImageFilter.GaussianBlur(picture.width / 32))
    shaded = Image.composite(Image.new("RGB", picture.size, (20, 20, 30)), picture, shadow)
    shaded.paste(sprite, (x, y), sprite)
    return shaded


def apply_style(picture: Image.Image, style: str) -> np.ndarray:
    """The picture in a style, as uint8 (H, W, 3); strokes and blocks are larger in larger ones."""
    return _STYLE[style](np.asarray(picture), max(1, picture.width // SIZE))


def _plain(image: np.ndarray, _: int) -> np.ndarray:
    return image


def _grey(image: np.ndarray, _: int) -> np.ndarray:
    grey = ImageOps.autocontrast(Image.fromarray(image).convert("L"), cutoff=1)
    return np.asarray(grey.convert("RGB"))


def _sketch(image: np.ndarray, scale: int) -> np.ndarray:
    """Dodge blend of the grey picture with its blurred negative: dark lines on paper."""
    grey = Image.fromarray(image).convert("L")
    blurred = np.asarray(grey.filter(ImageFilter.GaussianBlur(2.5 * scale)), np.float32)
    lines = np.clip(np.asarray(grey, np.float32) / np.maximum(blurred, 1), 0, 1) ** 2
    shade = 0.82 + 0.18 * np.asarray(grey, np.float32) / 255
    paper = np.array((250, 248, 240), np.float32)
    return ((lines * shade)[..., None] * paper).astype(np.uint8)


def _pixel(image: np.ndarray, scale: int) -> np.ndarray:
    """Blocks of two pixels a side, times `scale`, in five levels a channel."""
    side = 2 * scale
    height, width, _ = image.shape
    small = Image.fromarray(image).resize((width // side, height // side), Image.Resampling.BOX)
    levels = np.round(np.asarray(small, np.float32) / 63.75) * 63.75
    return levels.astype(np.uint8).repeat(side, 0).repeat(side, 1)


def _watercolour(image: np.ndarray, scale: int) -> np.ndarray:
    """Flat patches that run into each other, pale on white paper."""
    patches = (
        Image.fromarray(image)
        .filter(ImageFilter.MedianFilter(4 * scale + 1))
        .filter(ImageFilter.GaussianBlur(0.7 * scale))
    )
    pale = 255 - (255 - np.asarray(patches, np.float32)) * 0.62
    y, x = np.mgrid[-1 : 1 : image.shape[0] * 1j, -1 : 1 : image.shape[1] * 1j]
    paper = np.clip((np.maximum(abs(x), abs(y)) - 0.86) / 0.14, 0, 1)[..., None]
    return (pale * (1 - paper) + 255 * paper).astype(np.uint8)


_STYLE: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "plain": _plain,
    "sketch": _sketch,
    "pixel": _pixel,
    "watercolour": _watercolour,
    "grey": _grey,
}
