"""Tune-A-Video as people can deploy it. The public names load on first use, so `import tav_opt` is quick.

import tav_opt
from tav_opt import video

model = "stable-diffusion-v1-5/stable-diffusion-v1-5"                    # a directory or a hub id
clip = video.read("man-skiing.mp4", stride=2, count=24, height=512, width=512)
tav_opt.tune(model, clip, "a man is skiing", tav_opt.TrainConfig(steps=500), "tuned/")
engine = tav_opt.load("tuned/")                                          # a tuned clip on its base model
frames = tav_opt.edit(engine, "a panda is skiing")                       # uint8 (prompts, f, H, W, 3)
tav_opt.export_clip("tuned/", "serving/model_repository", name="skiing") # `tav_opt.export` is the package that does it
with tav_opt.Client("localhost:8001") as client:                         # of `tav-opt serve`
    edit = client.edit("skiing", "a panda is skiing")
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

_PUBLIC = {
    "load": ("tav_opt.engines.registry", "load"),
    "tune": ("tav_opt.tuning", "tune"),
    "edit": ("tav_opt.editing", "edit"),
    "export_clip": ("tav_opt.export.exporting", "export"),
    "Client": ("tav_opt.client", "Client"),
    "AsyncClient": ("tav_opt.client", "AsyncClient"),
    "Retry": ("tav_opt.client", "Retry"),
    "Tls": ("tav_opt.client", "Tls"),
    "ServerError": ("tav_opt.client", "ServerError"),
    "ClipConfig": ("tav_opt.config", "ClipConfig"),
    "TrainConfig": ("tav_opt.config", "TrainConfig"),
    "EditConfig": ("tav_opt.config", "EditConfig"),
    "Control": ("tav_opt.config", "Control"),
    "InputError": ("tav_opt.config", "InputError"),
}

__all__ = sorted(_PUBLIC)

UNINSTALLED = "0+uninstalled"
"""The version of a checkout that is imported as it lies there."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("tav-opt")
        except metadata.PackageNotFoundError:  # a checkout on a machine where nothing is installed
            return UNINSTALLED
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tav_opt' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
