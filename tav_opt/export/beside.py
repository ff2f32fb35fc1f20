"""Graphs that came to a base later, in the other forms that the base has: programs, engines, fp16 graphs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tav_opt.config import InputError, OnProgress
from tav_opt.engines.pytorch import TorchEngine
from tav_opt.export import graphs
from tav_opt.export.additions import Further
from tav_opt.export.graphs import Graph
from tav_opt.files import write_json
from tav_opt.repository import layout, specs
from tav_opt.repository.layout import MANIFEST, hashes
from tav_opt.schemas import BaseManifest

Make = Callable[[Graph, Path], dict[str, Any]]
"""A graph, and an empty folder for its files → what the manifest says of it beside them."""


@dataclass(frozen=True, kw_only=True)
class Lacking:
    """What a folder beside a base's graphs lacks of those that were added to the base."""

    makeable: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Networks, of which an exported base keeps the graph alone: their places are to be given again."""


def lacking(folder: Path, base: Path, given: Iterable[Further]) -> Lacking:
    """`given`: the graphs whose makers are known; raises InputError for one that the base has not."""
    there, known = specs.added(base), {one.name for one in given}
    if absent := sorted(known - set(there)):
        raise InputError(f"base {base.name} has no graph {absent[0]}: it is added to the base first")
    left = [name for name in there if name not in layout.made_of_added(folder, base)]
    makeable = [name for name in left if name in known or there[name].is_unet]
    return Lacking(makeable=makeable, unknown=[name for name in left if name not in makeable])


def again(
    names: Iterable[str], base: Path, given: Iterable[Further], eager: TorchEngine, own: Iterable[Graph]
) -> list[Graph]:
    """Graphs that were added to a base, of these names, as they were exported: those of `given`, and the UNet's.

    `eager` is a clip in eager PyTorch, `own` are the base's own graphs, of which the UNet has the clip's values.
    """
    sd, values = eager.sd, dict(next(graph.values for graph in own if graph.values))
    there, makers = specs.added(base), {one.name: one.make for one in given}
    latents = layout.manifest(base, BaseManifest)["latents"]
    return [
        makers[name](sd, values, latents) if name in makers else graphs.unet_of(sd, values, there[name])
        for name in names
    ]


def add(folder: Path, base: Path, added: Sequence[Graph], make: Make, on_progress: OnProgress | None = None) -> None:
    """Puts what is made of graphs beside what a folder, whose lock is held, has of the base's own.

    It is listed when all of it is there. What `make` raises goes through: then none is.
    """
    told, there = layout.manifest(folder), layout.manifest(base)["added"]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as work:
        for number, graph in enumerate(added):
            if on_progress is not None:
                on_progress(f"add {graph.name}", number, len(added))
            own = Path(work) / graph.name
            own.mkdir()
            said = make(graph, own)
            found[graph.name] = {"made_of": there[graph.name]["files"], **said, "files": hashes(own)}
        for name, one in found.items():
            for file in one["files"]:
                os.replace(Path(work) / name / file, folder / file)
    write_json(folder / MANIFEST, told | {"added": told.get("added", {}) | found})
    os.utime(base / MANIFEST)  # by which a server that has the base open sees that there is more
