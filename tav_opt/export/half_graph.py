"""The UNet of an exported base as an fp16 ONNX graph, which ONNX Runtime takes on GPUs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import torch
from torch import Tensor

from tav_opt.config import Additions, OnProgress, PathLike
from tav_opt.contract import VERSION
from tav_opt.engines import onnxruntime
from tav_opt.engines.exported import ExportedBase, ExportedEngine
from tav_opt.engines.pytorch import TorchEngine
from tav_opt.export import additions, beside, graphs, half, parity, whole_edit
from tav_opt.export.additions import Further
from tav_opt.export.graphs import Graph
from tav_opt.export.parity import OnGraph
from tav_opt.export.rounding import rounded
from tav_opt.export.shared_weights import share
from tav_opt.export.whole_edit import OnEdit
from tav_opt.files import whole, write_json
from tav_opt.repository import layout
from tav_opt.repository.layout import ENGINES, MANIFEST, base_of, check_unaltered, hashes, info_of, locked

CPU = torch.device("cpu")


def export(
    clip: Path,
    *,
    base: PathLike | Additions | None = None,
    further: Iterable[Further] = (),
    on_graph: OnGraph | None = None,
    on_edit: OnEdit | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Writes the fp16 UNet of an exported clip's base and returns its folder; one that is there and fits is left.

    `clip` is `clips/<name>` of a model repository, `base` where its base model is now. Of the graphs that were added to
    the base, those of the UNet come in fp16 too, and those of `further`: they read the fp16 UNet's weights. Raises
    ParityError where a graph, or a whole edit with the UNet, departs from eager PyTorch: then nothing is written.
    """
    exported = base_of(clip)
    check_unaltered(exported)
    folder = onnxruntime.half_folder(exported)
    traced = cache(lambda: graphs.of_clip(clip, base))
    with locked(exported / ENGINES):
        if not folder.is_dir() or onnxruntime.half_does_not_fit(exported) is not None:
            _write_unet(*traced(), clip, folder, on_graph, on_edit, on_progress)
        if lacking := beside.lacking(folder, exported, further := [*further]).makeable:
            make = partial(_added, exported=exported, unet=folder / onnxruntime.HALF_UNET, on_graph=on_graph)
            beside.add(folder, exported, beside.again(lacking, exported, further, *traced()), make, on_progress)
    return folder


def _write_unet(
    eager: TorchEngine,
    traced: list[Graph],
    clip: Path,
    folder: Path,
    on_graph: OnGraph | None,
    on_edit: OnEdit | None,
    on_progress: OnProgress | None,
) -> None:
    """The base's own, compared alone and by a whole edit."""
    exported = base_of(clip)
    unet = next(graph for graph in traced if graph.name == "unet")
    names = {value.name for value in unet.spec.values.values()}
    fresh = folder.with_name(f".{folder.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)  # of an export that was killed
    with whole(fresh) as temporary:
        temporary.mkdir()
        run = _run(half.write(exported / "unet.onnx", temporary / onnxruntime.HALF_UNET, names), unet)
        found = parity.check(unet, run, half=True)
        if on_graph is not None:
            on_graph("unet in fp16", found)
        edit = whole_edit.check(_engine(clip, exported, unet, run), eager, whole_edit.HALF, on_progress)
        if on_edit is not None:
            on_edit("onnxruntime in fp16", edit)
        content = {"version": VERSION, "made_of": layout.manifest(exported)["files"], "files": hashes(temporary)}
        write_json(temporary / MANIFEST, content | {"parity": found.to_json(), "edit": edit.to_json()})
    shutil.rmtree(folder, ignore_errors=True)  # made of other graphs
    fresh.rename(folder)


def _added(graph: Graph, folder: Path, *, exported: Path, unet: Path, on_graph: OnGraph | None) -> dict[str, Any]:
    """A graph that was added to the base, over the weights of its fp16 UNet."""
    names = {value.name for value in graph.spec.values.values()}
    path = half.write(exported / graph.spec.file, folder / onnxruntime.half_file(graph.name), names)
    lent = additions.lend(unet.with_name(f"{unet.name}.data"), folder)
    share(path, unet)
    found = parity.check(graph, _run(path, graph), half=True)
    lent.unlink()
    if on_graph is not None:
        on_graph(f"{graph.name} in fp16", found)
    return {"parity": found.to_json()}


def _engine(clip: Path, exported: Path, unet: Graph, run: parity.Run) -> ExportedEngine:
    """The clip as onnxruntime edits it on the processor, but for the UNet."""
    open_graphs = partial(onnxruntime.OnnxGraphs, exported, info_of(clip), CPU)
    engine = ExportedEngine.open(clip, ExportedBase.open(exported, "onnxruntime", open_graphs))

    def call(**inputs: Tensor) -> dict[str, Tensor]:
        return run(inputs, dict(unet.values))

    return replace(engine, calls={**engine.calls, "unet": call})


def _run(path: Path, graph: Graph) -> parity.Run:
    """The graph on the processor, every fp16 value rounded: onnxruntime alone would keep fp32 between some."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        own = Path(folder) / path.name
        for weights in path.parent.glob("*.data"):
            additions.lend(weights, own.parent)  # where the copy looks for its weights
        model = onnx.inliner.inline_local_functions(onnx.load(path, load_external_data=False))
        del model.graph.value_info[:]  # types of before the rounding
        onnx.save(rounded(model), own)
        run = parity.in_onnxruntime(own, graph.spec)

    def call(inputs: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
        return run(inputs, {name: value.half() for name, value in values.items()})

    return call
