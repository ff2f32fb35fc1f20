"""Responses of the unary model, kept for the same request again.

Triton's own response cache is not used: 2.51 keeps failures too, and answers the second try of a request that failed
with a success without outputs; and it would go on with a clip's old edits when the clip is exported anew.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tav_opt.contract import CLIP_NAME
from tav_opt.repository.layout import clip_folder, stamp

Response = dict[str, np.ndarray]


def key(inputs: Mapping[str, np.ndarray], version: Path) -> str | None:
    """Of a request: its tensors, and which export of its clip is in a version folder; None where there is none."""
    clip = inputs.get("clip")
    if clip is None or clip.dtype != np.object_ or clip.size != 1:
        return None
    name = clip.ravel()[0].decode(errors="replace")
    if not CLIP_NAME.match(name):
        return None
    if (export := stamp(clip_folder(version, name))) is None:
        return None
    whole = hashlib.sha256(repr(export).encode())
    for tensor in sorted(inputs):
        array = inputs[tensor]
        parts = list(array.ravel()) if array.dtype == np.object_ else [array.tobytes()]
        whole.update(repr((tensor, array.dtype.str, array.shape, [len(part) for part in parts])).encode())
        for part in parts:
            whole.update(part)
    return whole.hexdigest()


class Responses:
    """Kept up to `limit` bytes; what was used longest ago goes first. Threads may ask at once."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[str, Response] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str | None) -> Response | None:
        with self._lock:
            if name is None or name not in self._kept:
                return None
            self._kept.move_to_end(name)
            return self._kept[name]

    def put(self, name: str | None, response: Response) -> None:
        """Keeps a copy: the arrays of a BLS call lie in memory that Triton takes back."""
        size = _bytes(response)
        if name is None or size > self._limit:
            return
        copied = {tensor: np.array(array) for tensor, array in response.items()}
        with self._lock:
            if name not in self._kept:
                self._bytes += size
            self._kept[name] = copied
            while self._bytes > self._limit:
                self._bytes -= _bytes(self._kept.popitem(last=False)[1])

    def bytes(self) -> int:
        return self._bytes


def _bytes(response: Response) -> int:
    return sum(sum(map(len, a.ravel())) if a.dtype == np.object_ else a.nbytes for a in response.values())
