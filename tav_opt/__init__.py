"""Tune-A-Video as people can deploy it. The public names load on first use, so `import tav_opt` is quick.

engine = tav_opt.load("ckpt/")                                   # a tuned clip on its base model
frames = tav_opt.edit(engine, EditConfig(prompts=("a panda is skiing",)))   # uint8 (prompts, f, H, W, 3)
tav_opt.tune(model, clip, prompt, TrainConfig(steps=500), out)   # → ckpt/
tav_opt.export_clip(ckpt, repository)                            # `tav_opt.export` is the package that does it
with tav_opt.Client("localhost:8001") as client: client.edit("man-skiing", ["a panda is skiing"])
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

_PUBLIC = {
    "load": ("tav_opt.engines.pytorch", "open_checkpoint"),
    "tune": ("tav_opt.tuning", "tune"),
    "edit": ("tav_opt.editing", "edit"),
    "export_clip": ("tav_opt.export.repository", "export"),
    "Client": ("tav_opt.client", "Client"),
    "ClipConfig": ("tav_opt.config", "ClipConfig"),
    "TrainConfig": ("tav_opt.config", "TrainConfig"),
    "EditConfig": ("tav_opt.config", "EditConfig"),
    "InputError": ("tav_opt.config", "InputError"),
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("tav-opt")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tav_opt' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)
