"""Videos and pictures of a page: within it as long as they are small, else beside it."""

from __future__ import annotations

import base64
from pathlib import Path

EMBEDDED_BYTES = 24 << 20
"""Of videos at most that lie within a page itself; more lie beside it."""


def fit_in_a_page(files: set[Path]) -> bool:
    """Whether videos are few and small enough to lie within a page."""
    return sum(file.stat().st_size for file in files) <= EMBEDDED_BYTES


class Media:
    """The videos and pictures of one page."""

    def __init__(self, folder: Path, *, embed: bool) -> None:
        self._folder, self._embed = folder, embed
        self._known: dict[str, str] = {}

    def video(self, file: Path, name: str) -> str:
        """The address of a copy; one file of a name is copied once."""
        if name not in self._known:
            self._known[name] = self.put(file.read_bytes(), "video/mp4", f"videos/{name}")
        return self._known[name]

    def put(self, content: bytes, kind: str, place: str) -> str:
        """The address of a file's content: itself, or where it lies beside the page."""
        if self._embed:
            return f"data:{kind};base64,{base64.b64encode(content).decode()}"
        path = self._folder / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return place
