"""What a written edit says of itself, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from tav_opt.config import InputError, PathLike
from tav_opt.files import open_plain

MAX_LENGTH = 1 << 20
"""Of a comment; ours have some hundred letters."""


def settings_of(path: PathLike) -> dict[str, Any]:
    """The settings that an MP4, GIF, PNG or folder of PNGs by `video.write` carries.

    Raises InputError for a file that is none of these, and for one that has none: made elsewhere, or stripped of them.
    """
    path = Path(path)
    file = _first_picture(path) if path.is_dir() else path
    comment = _comment(file)
    try:
        found = json.loads(comment[:MAX_LENGTH])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not str(found.get("software", "")).startswith("tav-opt "):
        raise InputError(f"{path} does not say how it was made: not by tav-opt, or its comment was taken out")
    return found


def _first_picture(folder: Path) -> Path:
    if not (found := sorted(folder.glob("*.png"))):
        raise InputError(f"{folder} is no checkpoint, exported clip or model repository, and holds no PNGs of an edit")
    return found[0]


def _comment(path: Path) -> str:
    import av

    with open_plain(path) as file:
        head = file.read(12)
    try:
        if head[:4] == b"\x89PNG" or head[:3] == b"GIF":
            with Image.open(path, formats=("PNG", "GIF")) as image:
                found = image.info.get("Comment", image.info.get("comment", ""))
                return found.decode(errors="replace") if isinstance(found, bytes) else str(found)
        with av.open(str(path), options={"format_whitelist": "mov"}, metadata_errors="replace") as container:
            return container.metadata.get("comment", "")
    except (OSError, ValueError, SyntaxError, av.error.FFmpegError, Image.DecompressionBombError):
        raise InputError(f"{path} is no MP4, GIF or PNG that can be read") from None
