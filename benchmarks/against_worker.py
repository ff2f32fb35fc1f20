"""One checkout at work for against.py: a line on stdin asks for a piece of work, a line on stdout tells its seconds.

It runs with PYTHONPATH at its checkout, and so uses what checkouts of different ages have alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Never

import numpy as np

PROMPT = "a tiger on the beach"
_CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def main() -> Never:
    """Prepares what is asked for, then works line by line; an empty line, or the end, tells the peak of memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=["edit", "tune"])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    args = parser.parse_args()
    import tav_opt

    assert tav_opt.__file__ is not None and Path(tav_opt.__file__).is_relative_to(args.checkout), tav_opt.__file__
    _edit(args) if args.work == "edit" else _tune(args)
    os._exit(0)


def _told(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _asked() -> str:
    """The next piece of work; at the end tells of the memory, and ends."""
    if line := sys.stdin.readline().strip():
        return line
    _told(peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    os._exit(0)


def _edit(args: argparse.Namespace) -> None:
    """The exported clip `against` in the folder's repository, by settings of EditConfig, as JSON in each line."""
    from tav_opt import editing
    from tav_opt.config import EditConfig

    try:
        from tav_opt.engines.registry import open_clip
    except ImportError:
        from tav_opt.engines.onnxruntime import open_clip  # of checkouts before the registry

        engine = open_clip(args.folder / "repository", "against")
    else:
        engine = open_clip(args.folder / "repository", "against", engine=args.engine)
    _told(ready=True)
    clock = _CLOCKS[args.clock]
    while True:
        config = EditConfig(prompts=(PROMPT,), **json.loads(_asked()))
        began = clock()
        frames = editing.edit(engine, config)
        seconds = clock() - began
        np.save(args.folder / "frames.npy", frames)
        _told(seconds=seconds)


def _tune(args: argparse.Namespace) -> None:
    """One step of tuning for each line."""
    from tav_opt import tuning
    from tav_opt.checkpoint import load
    from tav_opt.config import TrainConfig
    from tav_opt.video import Clip

    info = load(args.checkpoint).info
    shape = (info.frames, info.height, info.width, 3)
    clip = Clip(frames=np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), fps=info.fps)
    began: float | None = None
    clock = _CLOCKS[args.clock]

    def on_step(stage: str, *_: object) -> None:
        nonlocal began
        if stage == "tune":
            _told(ready=True) if began is None else _told(seconds=clock() - began)
            _asked()
            began = clock()

    config = TrainConfig(steps=10_000, save_every=10_000)
    tuning.tune(info.base, clip, info.prompt, config, args.folder / "tuned", device="cpu", on_step=on_step)


if __name__ == "__main__":
    main()
