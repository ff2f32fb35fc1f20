"""Places of the demo's world: backgrounds with a horizon, drawn anew each time with small variations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Draw = Callable[[ImageDraw.ImageDraw, np.random.Generator, int], None]
"""Draws on a square canvas of the given side."""

OVERSAMPLING = 2
PLAIN: dict[str, Colour] = {
    "white": (246, 246, 244),
    "blue": (120, 178, 240),
    "pink": (246, 170, 200),
    "yellow": (250, 222, 110),
}


def background(place: str, rng: np.random.Generator, size: int) -> Image.Image:
    """An RGB picture (size × size) of a place."""
    side = size * OVERSAMPLING
    picture = Image.new("RGB", (side, side))
    DRAW[place](ImageDraw.Draw(picture), rng, side)
    return picture.resize((size, size), Image.Resampling.BOX)


def _gradient(draw: ImageDraw.ImageDraw, top: float, bottom: float, upper: Colour, lower: Colour) -> None:
    """Rows from `top` to `bottom` pass from one colour to the other."""
    side = draw.im.size[0]
    for y in range(int(top), int(bottom)):
        part = (y - top) / max(1.0, bottom - top)
        draw.line((0, y, side, y), fill=tuple(round(a + (b - a) * part) for a, b in zip(upper, lower, strict=True)))


def _horizon(rng: np.random.Generator, side: int, middle: float) -> float:
    return side * (middle + rng.uniform(-0.04, 0.04))


def _plain(colour: Colour) -> Draw:
    def draw_plain(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
        shade = tuple(round(value * 0.86) for value in colour)
        _gradient(draw, 0, side, colour, shade)  # type: ignore[arg-type]

    return draw_plain


def _beach(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    sea, sand = _horizon(rng, side, 0.36), _horizon(rng, side, 0.58)
    _gradient(draw, 0, sea, (130, 200, 250), (205, 235, 252))
    _gradient(draw, sea, sand, (20, 120, 190), (70, 190, 205))
    _gradient(draw, sand, side, (250, 226, 170), (228, 190, 120))
    draw.line((0, sand, side, sand), fill=(255, 255, 255), width=side // 32)


def _snow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    ground = _horizon(rng, side, 0.55)
    _gradient(draw, 0, side, (150, 180, 212), (205, 222, 238))
    for centre in (rng.uniform(0, 0.4), rng.uniform(0.6, 1)):
        x, height = centre * side, rng.uniform(0.2, 0.3) * side
        draw.polygon(((x - 0.4 * side, ground), (x, ground - height), (x + 0.4 * side, ground)), fill=(176, 196, 222))
        draw.polygon(
            (
                (x - 0.13 * side, ground - 0.67 * height),
                (x, ground - height),
                (x + 0.13 * side, ground - 0.67 * height),
            ),
            fill=(240, 246, 252),
        )
    _gradient(draw, ground, side, (250, 252, 255), (214, 226, 242))
    for x, y in rng.uniform(0, side, (18, 2)):
        draw.ellipse((x, y, x + side / 40, y + side / 40), fill=(255, 255, 255))


def _sunset(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    ground = _horizon(rng, side, 0.62)
    _gradient(draw, 0, ground, (110, 50, 130), (255, 150, 60))
    x, radius = rng.uniform(0.2, 0.8) * side, 0.13 * side
    draw.ellipse((x - radius, ground - radius, x + radius, ground + radius), fill=(255, 226, 110))
    _gradient(draw, ground, side, (140, 60, 70), (50, 24, 60))


def _forest(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    ground = _horizon(rng, side, 0.66)
    _gradient(draw, 0, ground, (150, 200, 150), (96, 158, 110))
    for index in range(6):
        x = (index + rng.uniform(0.2, 0.8)) * side / 6
        top, half = rng.uniform(0.02, 0.2) * side, 0.13 * side
        draw.rectangle((x - side / 50, ground - 0.12 * side, x + side / 50, ground), fill=(90, 60, 40))
        draw.polygon(((x - half, ground - 0.1 * side), (x, top), (x + half, ground - 0.1 * side)), fill=(26, 92, 50))
    _gradient(draw, ground, side, (86, 130, 60), (52, 92, 40))


def _night(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    ground = _horizon(rng, side, 0.74)
    _gradient(draw, 0, ground, (8, 10, 40), (40, 46, 100))
    for x, y in rng.uniform(0, (side, ground), (22, 2)):
        draw.ellipse((x, y, x + side / 50, y + side / 50), fill=(250, 250, 220))
    x, radius = rng.uniform(0.78, 0.88) * side, 0.1 * side
    draw.ellipse((x - radius, 0.06 * side, x + radius, 0.06 * side + 2 * radius), fill=(250, 240, 190))
    _gradient(draw, ground, side, (26, 30, 50), (12, 14, 26))


def _city(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    ground = _horizon(rng, side, 0.7)
    _gradient(draw, 0, ground, (190, 214, 234), (228, 234, 238))
    for index in range(5):
        left, top = index * side / 5, rng.uniform(0.06, 0.34) * side
        grey = int(rng.integers(90, 150))
        draw.rectangle((left, top, left + side / 5 - 2, ground), fill=(grey, grey, grey + 16))
        for y in np.arange(top + side / 20, ground - side / 20, side / 10):
            for x in (left + side / 25, left + side / 9):
                draw.rectangle((x, y, x + side / 24, y + side / 24), fill=(250, 230, 140))
    _gradient(draw, ground, side, (96, 96, 102), (70, 70, 76))
    draw.rectangle((0, 0.86 * side, side, 0.88 * side), fill=(235, 235, 220))


def _desert(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    ground = _horizon(rng, side, 0.52)
    _gradient(draw, 0, ground + 0.1 * side, (250, 226, 160), (255, 244, 212))
    for centre in (rng.uniform(-0.1, 0.4), rng.uniform(0.6, 1.1)):
        x = centre * side
        draw.ellipse((x - 0.6 * side, ground - 0.06 * side, x + 0.6 * side, side), fill=(226, 150, 76))
    _gradient(draw, ground + 0.1 * side, side, (236, 168, 90), (200, 116, 52))


def _meadow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    ground = _horizon(rng, side, 0.56)
    _gradient(draw, 0, ground, (90, 170, 245), (196, 228, 250))
    for x, y in rng.uniform((0, 0.05), (0.9, 0.3), (2, 2)) * side:
        draw.ellipse((x, y, x + 0.26 * side, y + 0.1 * side), fill=(255, 255, 255))
    _gradient(draw, ground, side, (126, 206, 80), (64, 150, 50))


PLACES: dict[str, tuple[str, str]] = {
    "beach": ("on the beach", "at the beach"),
    "snow": ("in the snow", "in snow"),
    "sunset": ("at sunset", "in front of a sunset"),
    "forest": ("in the forest", "in a forest"),
    "night": ("under the night sky", "at night"),
    "city": ("in the city", "in a city street"),
    "desert": ("in the desert", "in a desert"),
    "meadow": ("on a meadow", "on the grass"),
} | {name: (f"on a {name} background", f"in front of a {name} wall") for name in PLAIN}
"""Each place with the phrases that captions use for it, the usual one first."""

DRAW: dict[str, Draw] = {
    "beach": _beach,
    "snow": _snow,
    "sunset": _sunset,
    "forest": _forest,
    "night": _night,
    "city": _city,
    "desert": _desert,
    "meadow": _meadow,
} | {name: _plain(colour) for name, colour in PLAIN.items()}
