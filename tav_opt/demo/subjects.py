"""Subjects of the demo's world as pictures: Fluent emoji from npm, or shapes generated on the spot."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw

from tav_opt.config import InputError
from tav_opt.files import whole

STILLS = "@lobehub/fluent-emoji-3d@1.1.0"
ANIMATIONS = "@lobehub/fluent-emoji-anim-1@1.0.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tav-opt"
SPRITE_SIZE = 128
"""Longest side in pixels at which sprites are kept: above what any scene needs."""

JUDGED: dict[str, str] = {
    "leopard": "1f406",
    "tiger": "1f405",
    "rabbit": "1f407",
    "dog": "1f415",
    "cat": "1f408",
    "penguin": "1f427",
    "panda": "1f43c",
    "fox": "1f98a",
    "elephant": "1f418",
    "frog": "1f438",
    "lion": "1f981",
    "cow": "1f404",
    "pig": "1f416",
    "horse": "1f40e",
    "sheep": "1f411",
    "giraffe": "1f992",
    "zebra": "1f993",
    "camel": "1f42a",
    "rooster": "1f413",
    "owl": "1f989",
    "parrot": "1f99c",
    "flamingo": "1f9a9",
    "turtle": "1f422",
    "dolphin": "1f42c",
    "whale": "1f433",
    "octopus": "1f419",
    "crab": "1f980",
    "snail": "1f40c",
    "butterfly": "1f98b",
    "dinosaur": "1f995",
    "car": "1f697",
    "racing car": "1f3ce-fe0f",
    "bus": "1f68c",
    "tractor": "1f69c",
    "rocket": "1f680",
    "sailboat": "26f5",
    "apple": "1f34e",
    "banana": "1f34c",
    "burger": "1f354",
    "pizza": "1f355",
    "watermelon": "1f349",
    "strawberry": "1f353",
    "donut": "1f369",
    "pineapple": "1f34d",
    "carrot": "1f955",
    "robot": "1f916",
    "snowman": "26c4",
    "sunflower": "1f33b",
    "mushroom": "1f344",
    "surfer": "1f3c4",
}
"""The fifty subjects that the model is judged on, with their emoji's code points."""

FURTHER: dict[str, str] = {
    "bear": "1f43b",
    "chick": "1f425",
    "bee": "1f41d",
    "motorcycle": "1f3cd-fe0f",
    "guitar": "1f3b8",
    "teddy bear": "1f9f8",
    "ghost": "1f47b",
    "Christmas tree": "1f384",
    "cactus": "1f335",
    "snowboarder": "1f3c2",
}
"""Subjects that the model also learns."""

MOVING = ("leopard", "rabbit", "racing car", "chick")
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
