"""What an exported clip was tuned on, to be shown: its latents decoded by its base's VAE alone, once."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np

from tav_opt import video
from tav_opt.config import InputError, first_line
from tav_opt.repository.layout import base_of, find_clip, info_of, stamp
from tav_opt.video import Clip

KEPT = 8
"""Clips in memory: 19 MB each at 24 frames of 512²."""
AT_ONCE = 4


class ClipSources:
    """Those of the clips of a repository, decoded when they are first asked for; their files lie in `folder`."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self._repository, self._folder, self._lock = repository, folder.absolute(), Lock()
        self._found: OrderedDict[object, Clip] = OrderedDict()

    def get(self, name: str) -> Clip:
        """Raises InputError where the clip is not here, or its base cannot be opened."""
        folder = find_clip(self._repository, name)
        with self._lock:
            key = (name, stamp(folder))
            if key not in self._found:
                self._found[key] = _decoded(folder)
                while len(self._found) > KEPT:
                    self._found.popitem(last=False)
            self._found.move_to_end(key)
            return self._found[key]

    def file(self, name: str) -> Path:
        """As an MP4 of this export; raises as `get` does."""
        mark = stamp(find_clip(self._repository, name)) or (0, 0)
        path = self._folder / f"{name}-{mark[0]}.mp4"
        if not path.is_file():
            clip = self.get(name)
            video.write(path, clip.frames, clip.fps)
        return path


def _decoded(folder: Path) -> Clip:
    import torch

    from tav_opt import checkpoint
    from tav_opt.clip_folder import ClipFolder
    from tav_opt.engines.onnxruntime import session
    from tav_opt.files import MANIFEST
    from tav_opt.video.pixels import to_frames

    tuned = checkpoint.load(ClipFolder(folder, MANIFEST))
    try:
        vae = session(base_of(folder) / "vae_decoder.onnx", torch.device("cpu"))
    except InputError:
        raise
    except Exception as error:  # onnxruntime has errors of its own
        raise InputError(f"{folder.name} cannot be shown: {first_line(error)}") from None
    parts = tuned.source_latents[0].transpose(0, 1).float().split(AT_ONCE)  # f c h w
    (taken,), frames = [one.name for one in vae.get_inputs()], []
    for part in parts:
        pixels = vae.run(None, {taken: np.ascontiguousarray(part.numpy())})[0]
        frames.append(to_frames(torch.from_numpy(pixels)).numpy())
    return Clip(frames=np.concatenate(frames), fps=info_of(folder).fps, sound=tuned.sound)
