"""What is exported, read from the clips' manifests, and the model that tells what a clip takes, whatever edits run."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tav_opt.contract import CLIP_NAME, CLIPS_INPUTS, ClipInfo, to_clip_tensors
from tav_opt.repository.layout import Stamp, clip_folder, clip_names, info_of, stamp, version_folder
from tav_opt.serving.envelope import asked_for, read
from tav_opt.serving.failures import UnknownClip, message, status
from tav_opt.serving.unary import CODES

REPLACED_SECONDS = 0.02
"""How long an export needs, at most, between taking the old clip away and putting the new one in its place."""


class Catalogue:
    """The clips of a version folder, as they are there now."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Of all clips."""
        return clip_names(self._folder)

    def stamp(self, name: str) -> Stamp:
        """Another for every export; raises UnknownClip, naming those there are."""
        if CLIP_NAME.match(name):
            for wait in (REPLACED_SECONDS, 0):
                if (found := self.found(name)) is not None:
                    return found
                time.sleep(wait)
        raise UnknownClip(f"clip {name[:63]!r} is unknown; exported are: {', '.join(self.names()) or 'none'}")

    def found(self, name: str) -> Stamp | None:
        """The stamp of a clip that is there this moment."""
        return stamp(clip_folder(self._folder, name))

    def info(self, name: str) -> ClipInfo:
        """A clip's description; raises UnknownClip, and InputError for a damaged one."""
        self.stamp(name)
        return info_of(clip_folder(self._folder, name))


class TritonPythonModel:
    """The model as the Python backend drives it; it needs neither torch nor an engine."""

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        self._pb: Any = pb_utils
        self._catalogue = Catalogue(version_folder(Path(args["model_repository"]).parent))

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            read(request, (tensor.name for tensor in CLIPS_INPUTS))
            asked = self._pb.get_input_tensor_by_name(request, "clip")
            tensors = asked_for(request, to_clip_tensors(self._all() if asked is None else self._one(asked.as_numpy())))
            return self._pb.InferenceResponse([self._pb.Tensor(name, array) for name, array in tensors.items()])
        except Exception as error:  # whatever a request does, it gets a response
            code = getattr(self._pb.TritonError, CODES.get(status(error), status(error)))
            return self._pb.InferenceResponse(error=self._pb.TritonError(message(error), code))

    def _all(self) -> dict[str, ClipInfo]:
        """But for damaged ones, which cannot be edited: the log names them."""
        found = {}
        for name in self._catalogue.names():
            try:
                found[name] = self._catalogue.info(name)
            except UnknownClip:  # removed since
                pass
            except Exception as error:
                print(f"clip {name} cannot be read, and is not told of: {error}", file=sys.stderr, flush=True)
        return found

    def _one(self, asked: np.ndarray) -> dict[str, ClipInfo]:
        name = asked[0].decode(errors="replace")
        try:
            return {name: self._catalogue.info(name)}
        except UnknownClip:
            raise
        except Exception as error:  # the client gave nothing wrong: not an InputError any more
            raise RuntimeError(f"clip {name} cannot be read: {error}") from error
