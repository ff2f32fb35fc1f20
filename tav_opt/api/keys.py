"""Who may ask: API keys, and whose they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from tav_opt.config import InputError
from tav_opt.files import open_plain

MIN_KEY = 16
"""Letters; shorter ones can be guessed."""
MAX_FILE_BYTES = 1 << 20
ANYONE = ""
"""Owner of what is asked for where there are no keys."""


class Keys:
    """Owners by the hashes of their keys: how long a look-up takes says nothing of a key."""

    def __init__(self, owners: Mapping[str, str] | None) -> None:
        self._owners = None if owners is None else {_hash(key): owner for key, owner in owners.items()}

    @property
    def needed(self) -> bool:
        """Whether it takes a key to ask."""
        return self._owners is not None

    def owner(self, header: str | None) -> str | None:
        """Whose key an Authorization header bears; None for no key, or one of nobody's."""
        if self._owners is None:
            return ANYONE
        kind, _, key = (header or "").partition(" ")
        return self._owners.get(_hash(key.strip())) if kind.lower() == "bearer" else None

    @classmethod
    def read(cls, path: Path | None) -> Keys:
        """Of lines `owner key`, of which those that begin with # say nothing.

        Raises InputError for a file that cannot be read, other lines, short keys, and a key that stands there twice.
        """
        if path is None:
            return cls(None)
        with open_plain(path) as file:
            text = file.read(MAX_FILE_BYTES).decode(errors="replace")
        owners: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2:
                raise InputError(f"{path}, line {number}: must be an owner's name and a key, as `anna 6fe3…`")
            owner, key = words
            if len(key) < MIN_KEY:
                raise InputError(f"{path}, line {number}: the key of {owner} has under {MIN_KEY} letters")
            if key in owners:
                raise InputError(f"{path}, line {number}: this key stands there twice")
            owners[key] = owner
        if not owners:
            raise InputError(f"{path} has no key: give lines of an owner's name and a key, as `anna 6fe3…`")
        return cls(owners)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
