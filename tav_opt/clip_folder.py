"""A tuned clip on disk, as tuning or an export left it: found once, it travels in place of its path."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tav_opt.config import InputError, PathLike
from tav_opt.contract import ClipInfo
from tav_opt.files import DESCRIPTION, MANIFEST, read_object


@dataclass(frozen=True)
class ClipFolder:
    """Where the values and latents of a clip lie, and its description, which is written last: what has one is whole."""

    path: Path
    file: str
    """The description's name."""
    hub_id: str | None = None
    """Of the repository on the Hugging Face hub that it was fetched from."""

    @classmethod
    def found(cls, folder: PathLike) -> ClipFolder | None:
        """None for a folder that holds no finished clip."""
        folder = Path(folder)
        if (folder / DESCRIPTION).is_file():
            return cls(folder, DESCRIPTION)
        exported = folder.resolve().parent.name == "clips" and (folder / MANIFEST).is_file()
        return cls(folder, MANIFEST) if exported else None

    @classmethod
    def at(cls, folder: PathLike | ClipFolder) -> ClipFolder:
        """The clip in a folder, or of a hub id (owner/name), which is fetched.

        Raises InputError where there is no finished clip, before anything is loaded that takes seconds.
        """
        if isinstance(folder, ClipFolder):
            return folder
        if found := cls.found(folder):
            return found
        if (hub_id := hub_id_of(folder)) is not None:
            from tav_opt.base import hub

            return cls(hub.fetch_clip(hub_id), DESCRIPTION, hub_id)
        kind = "is half-written: tuning did not finish" if any(Path(folder).glob("resume*")) else "is not a checkpoint"
        raise InputError(f"{folder} {kind} (no {DESCRIPTION})")

    @property
    def name(self) -> str:
        """The folder's, or the hub id."""
        return self.hub_id or self.path.resolve().name

    @property
    def files(self) -> tuple[str, ...]:
        """Of the clip itself, its description last."""
        return (*self.description.get("files", {}), self.file)

    @property
    def exported(self) -> bool:
        """Whether it is `clips/<name>` of a model repository, where its base's graphs lie too."""
        return self.file == MANIFEST

    @cached_property
    def description(self) -> dict[str, Any]:
        """All that is said of it."""
        return read_object(self.path / self.file)

    @cached_property
    def info(self) -> ClipInfo:
        """Raises InputError for another version or missing entries."""
        return ClipInfo.from_json(self.description)

    @property
    def settings(self) -> dict[str, Any]:
        """What it was tuned with, where that was kept; raises InputError for a description that lies."""
        from tav_opt import schemas

        schemas.check(schemas.ClipDescription, self.description, self.path / self.file)
        return dict(self.description.get("settings", {}))


def hub_id_of(path: PathLike) -> str | None:
    """What may be a hub id, owner/name, since nothing here has that name; None for what is a path alone."""
    name = Path(path)
    is_one = len(name.parts) == 2 and not name.is_absolute() and not name.parts[0].startswith(".")
    return name.as_posix() if is_one and not name.exists() and not name.parent.is_dir() else None
