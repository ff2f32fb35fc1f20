"""Graphs that come to a base beside its own: whoever does not ask for them pays nothing, and nothing that is there
changes. Their weights are the base's, where they are the same."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tav_opt.config import InputError, OnProgress
from tav_opt.export import graphs, parity
from tav_opt.export.graphs import Graph
from tav_opt.export.parity import OnGraph
from tav_opt.export.shared_weights import share
from tav_opt.files import discard, write_json
from tav_opt.models import StableDiffusion
from tav_opt.repository import layout, specs
from tav_opt.repository.layout import MANIFEST, hashes
from tav_opt.schemas import BaseManifest

Make = Callable[[StableDiffusion, dict[str, Tensor], Sequence[int]], Graph]
"""A base with a clip's values, these values, the shape (c, f, h, w) of its latents → the graph."""


@dataclass(frozen=True, kw_only=True)
class Further:
    """A graph that a base may get."""

    name: str
    make: Make
    made_of: Mapping[str, Any] = field(default_factory=dict)
    """What it is made of beside the base, as JSON has it: of the same name there is but one."""


def lacking(base: Path, further: Iterable[Further]) -> list[Further]:
    """Those that an exported base has not yet; raises InputError where it has one of the name of something else."""
    there = layout.manifest(base, BaseManifest).get("added", {})
    for one in further:
        if one.name in there and there[one.name].get("made_of", {}) != one.made_of:
            raise InputError(
                f"base {base.name} has a {one.name} that is made of something else: give it another name, or export to "
                "another --repository"
            )
    return [one for one in further if one.name not in there]


def add(
    base: Path,
    further: Sequence[Further],
    sd: StableDiffusion,
    values: dict[str, Tensor],
    on_graph: OnGraph | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Adds graphs to an exported base, whose lock is held; its own files, and their revision, stay as they are.

    All are compared with eager PyTorch before the first is put in its place, and are listed when all are there. Raises
    ParityError, and InputError: then none is.
    """
    told = layout.manifest(base, BaseManifest)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=base, prefix=".new-") as work:
        for number, one in enumerate(further):
            if on_progress is not None:
                on_progress(f"add {one.name}", number, len(further))
            graph = one.make(sd, values, told["latents"])
            folder = Path(work) / one.name
            folder.mkdir()
            lent = lend(base / "unet.onnx.data", folder)
            reached = _written(graph, folder, base)
            lent.unlink()
            found[one.name] = {
                "graph": asdict(graph.spec),
                "made_of": dict(one.made_of),
                "parity": reached.to_json(),
                "files": hashes(folder),
            }
            if on_graph is not None:
                on_graph(one.name, reached)
        for name, added in found.items():
            for file in added["files"]:
                os.replace(Path(work) / name / file, base / file)
    if found:
        write_json(base / MANIFEST, told | {"added": told.get("added", {}) | found})


def _written(graph: Graph, folder: Path, base: Path) -> parity.Parity:
    """Writes a graph into a folder that has the base's weights in it; raises ParityError."""
    path = graphs.write(graph, folder)
    share(path, base / specs.read(base)["unet"].file)
    return parity.check(graph, parity.in_onnxruntime(path, graph.spec))


def lend(file: Path, folder: Path) -> Path:
    """The same file in another folder; a copy where there are no hard links."""
    lent = folder / file.name
    discard(lent)
    with suppress(OSError):
        os.link(file, lent)
        return lent
    return Path(shutil.copy2(file, lent))
