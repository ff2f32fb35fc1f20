"""The pictures that the demo's world is made of as one file, for a machine without a network.

`python benchmarks/gpu/sprites.py FILE` writes it where npm can fetch them; `make gpu-wheels` does.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

PACKED = Path(__file__).parents[2] / "gpu-wheels" / "sprites.zip"
"""Where a stage looks for it."""


def pack(sprites: Mapping[str, Sequence[Image.Image]], path: Path) -> None:
    """Writes all sprites of each subject as PNG."""
    with zipfile.ZipFile(path, "w") as file:
        for subject, pictures in sprites.items():
            for number, picture in enumerate(pictures):
                content = io.BytesIO()
                picture.save(content, "PNG")
                file.writestr(f"{subject}/{number:02}.png", content.getvalue())


def unpack(path: Path) -> dict[str, list[Image.Image]]:
    """The sprites that `pack` wrote, in its order, by which some combinations are kept from training."""
    found: dict[str, list[Image.Image]] = {}
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            picture = Image.open(io.BytesIO(file.read(name)))
            found.setdefault(name.partition("/")[0], []).append(picture.copy())
    return found


if __name__ == "__main__":
    from tav_opt.demo import subjects

    pack(subjects.sprites(), Path(sys.argv[1]))
