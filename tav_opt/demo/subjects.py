"""Subjects of the demo's world as pictures: Fluent emoji from npm, or shapes generated on the spot."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw

from tav_opt.config import InputError
from tav_opt.demo.emoji import FURTHER, JUDGED
from tav_opt.files import whole

STILLS = "@lobehub/fluent-emoji-3d@1.1.0"
ANIMATIONS = "@lobehub/fluent-emoji-anim-1@1.0.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tav-opt"
SPRITE_SIZE = 128
"""Longest side in pixels at which sprites are kept: above what any scene needs."""

MOVING = ("leopard", "rabbit", "horse", "chick")
"""Subjects whose animation is learned too: those of the clips."""
POSES = 12
"""Frames of each animation that are learned."""


def package(name: str, cache: Path = CACHE) -> Path:
    """The folder of an npm package (`@scope/name@version`), fetched once into the cache.

    Raises InputError when npm cannot fetch it.
    """
    folder = cache / "npm" / name.rpartition("/")[2].replace("@", "-")
    if not folder.is_dir():
        with whole(folder) as temporary:
            temporary.mkdir()
            _unpack(_npm_pack(name, temporary.parent), temporary)
    return folder


def _npm_pack(name: str, folder: Path) -> Path:
    command = ["npm", "pack", name, "--silent", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise InputError("npm is not installed: it fetches the emoji of the demo's world (or use --smoke)") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"npm cannot fetch {name}: {reason}") from None
    return folder / done.stdout.split()[-1]


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            member.name = member.name.removeprefix("package/")
            tar.extract(member, folder, filter="data")


def stills(codes: dict[str, str], cache: Path = CACHE) -> dict[str, list[Image.Image]]:
    """One RGBA sprite of each subject, cropped to what is visible."""
    assets = package(STILLS, cache) / "assets"
    return {name: [_trim(Image.open(assets / f"{code}.webp").convert("RGBA"))] for name, code in codes.items()}


def animation(code: str, cache: Path = CACHE) -> tuple[list[Image.Image], float]:
    """The RGBA frames (256×256) of an animated emoji, and its frames per second."""
    picture = Image.open(package(ANIMATIONS, cache) / "assets" / f"{code}.webp")
    frames, milliseconds = [], 0
    for index in range(getattr(picture, "n_frames", 1)):
        picture.seek(index)
        frames.append(picture.convert("RGBA"))
        milliseconds += picture.info.get("duration", 42) or 42
    return frames, 1000 * len(frames) / milliseconds


def sprites(cache: Path = CACHE) -> dict[str, list[Image.Image]]:
    """All sprites of each subject: its still, and for the moving ones poses of the animation."""
    found = stills(JUDGED | FURTHER, cache)
    for name in MOVING:
        frames, _ = animation((JUDGED | FURTHER)[name], cache)
        found[name] += [_trim(frame) for frame in frames[:: max(1, len(frames) // POSES)]]
    return found


def _trim(picture: Image.Image) -> Image.Image:
    cropped = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    cropped.thumbnail((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)
    return cropped


def shapes() -> dict[str, list[Image.Image]]:
    """Sprites that need no data: coloured circles, squares and triangles."""
    colours = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220)}
    return {
        f"{colour} {shape}": [_shape(shape, rgb)]
        for colour, rgb in colours.items()
        for shape in ("circle", "square", "triangle")
    }


def _shape(shape: str, rgb: tuple[int, int, int]) -> Image.Image:
    picture = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
    draw, last = ImageDraw.Draw(picture), SPRITE_SIZE - 1
    if shape == "circle":
        draw.ellipse((0, 0, last, last), fill=rgb)
    elif shape == "square":
        draw.rectangle((0, 0, last, last), fill=rgb)
    else:
        draw.polygon(((0, last), (last, last), (last / 2, 0)), fill=rgb)
    return picture
