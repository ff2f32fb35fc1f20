"""`python -m tav_opt.app.tuner RUN`: tunes in a process of its own what the page has written down in the folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tav_opt import command
from tav_opt.config import ClipConfig, InputError, TrainConfig
from tav_opt.files import read_object

RUN, EVENTS, CHECKPOINT = "run.json", "events.jsonl", "ckpt"
"""What is to be done; a line of what happened for every step; what came of it."""


def main(arguments: list[str]) -> None:
    """Tunes, or goes on; SIGTERM stops after the present step, whose state is kept."""
    folder = Path(arguments[0])
    asked = read_object(folder / RUN)
    with (folder / EVENTS).open("a", buffering=1) as events:

        def tell(**said: Any) -> None:
            events.write(json.dumps({"at": time.time(), **said}) + "\n")

        tell(event="begun")
        try:
            _tune(folder, asked, lambda *step: tell(**dict(zip(("stage", "step", "steps", "loss"), step, strict=True))))
        except KeyboardInterrupt:
            tell(event="stopped")
            raise
        except Exception as error:
            text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            tell(event="failed", error=" ".join(text.split())[: command.MAX_LINE])
            raise
        tell(event="done")


def _tune(folder: Path, asked: dict[str, Any], on_step: Callable[..., object]) -> None:
    from tav_opt import tuning, video

    clip = ClipConfig(**asked["clip"])
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in asked["train"].items()}
    train = TrainConfig(**settings)
    frames = video.read(clip)
    tuning.tune(asked["model"], frames, asked["caption"], train, folder / CHECKPOINT, source=clip, on_step=on_step)


if __name__ == "__main__":
    import sys

    sys.exit(command.run("tav-opt app: tuning", main))
