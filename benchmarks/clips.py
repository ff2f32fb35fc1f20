"""What a second clip costs on disk, in seconds and in memory: `python benchmarks/clips.py --help`."""

from __future__ import annotations

import gc
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from common import apart, header, machine
from presets import prepare

from tav_opt import checkpoint, command
from tav_opt.engines import registry
from tav_opt.engines.exported import ExportedBase, ExportedEngine
from tav_opt.export.exporting import add
from tav_opt.files import write_json
from tav_opt.repository.layout import info_of, version_folder


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Add clips to one base, then hold all of them open at once in ONNX Runtime."""

    preset: str = "demo"
    """demo, sd15 (random weights), or a checkpoint's folder."""
    count: int = 8
    frames: int = 24
    size: int | None = None
    """Pixels of a side; default: the model's own."""
    out: Path = Path("benchmarks/results/clips.json")


def main(config: Clips) -> int:
    """Measures and prints; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(config, Path(folder))
    print(header(f"{config.count} clips on one base, {config.preset}, {config.frames} frames"))
    print(*(f"- {name}: {value}" for name, value in rows.items()), sep="\n")
    write_json(config.out, {"machine": machine(), "measured": rows})
    return 0


def _measure(config: Clips, work: Path) -> dict[str, float | str]:
    ckpt = prepare(config.preset, work, frames=config.frames, size=config.size, steps=2)
    repository = work / "repository"
    first = add(ckpt, repository, name="clip-0")
    tuned = checkpoint.load(ckpt)
    seconds = []
    for number in range(1, config.count):
        other = replace(tuned, values={name: value + number / 1000 for name, value in tuned.values.items()})
        checkpoint.save(other, work / "other", settings={})
        added = add(work / "other", repository, name=f"clip-{number}")
        assert not added.graphs
        seconds.append(added.seconds)
    del tuned, other
    version = version_folder(repository)
    values, resident = apart(partial(held, config.count, version, added.clip.info.exported_base))
    return {
        "base on disk, MB": round(added.clip.base_size / 1e6, 1),
        "clip on disk, MB": round(added.clip.size / 1e6, 2),
        "clip over base": f"{added.clip.size / added.clip.base_size:.1%}",
        "seconds to add the first clip, with its graphs": round(first.seconds, 1),
        "seconds to add another, the longest": round(max(seconds), 2),
        "values and latents of a clip in memory, MB": round(values / 1e6, 2),
        "resident with one clip, MB": round(resident[0] / 1e6, 1),
        f"resident with {config.count} clips, MB": round(resident[-1] / 1e6, 1),
        "one clip and the others' values, MB": round((resident[0] + (config.count - 1) * values) / 1e6, 1),
        "a further clip, the most, MB": round(float(np.diff(resident).max()) / 1e6, 2),
    }


def held(count: int, version: Path, base_name: str) -> tuple[int, list[int]]:
    """The bytes of a clip, and what is resident with 1, 2, … clips, each of which has predicted."""
    before = _resident()
    info, folder = info_of(version / "clips" / "clip-0"), version / "base" / base_name
    base = registry.open_base(folder, info, registry.choose(folder, info, torch.device("cpu")), threads=2)
    engines, resident = [], []
    for number in range(count):
        engines.append(_opened(version, base, number))
        resident.append(_resident() - before)
    return engines[0].held_bytes, resident


def _opened(version: Path, base: ExportedBase, number: int) -> ExportedEngine:
    """A clip that has predicted: its buffers are there."""
    engine = ExportedEngine.open(version / "clips" / f"clip-{number}", base)
    engine.predict(engine.inverted_latents, 501, engine.encode_text(["a panda"]))
    return engine


def _resident() -> int:
    """Bytes of the process's own pages: those of mapped files are shared and can be dropped."""
    gc.collect()
    return int(psutil.Process().memory_full_info().uss)


if __name__ == "__main__":
    sys.exit(
        command.run(
            "benchmarks/clips.py", lambda arguments: main(tyro.cli(Clips, prog="benchmarks/clips.py", args=arguments))
        )
    )
