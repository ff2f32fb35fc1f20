"""Engines of graphs that were added to a base, beside those of its own: each has its weights inside, once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_opt.conditions.attention_control import CONTROL
from tav_opt.engines import tensorrt_library
from tav_opt.engines.pytorch import TorchEngine
from tav_opt.export import beside
from tav_opt.export.additions import Further
from tav_opt.export.graphs import Graph
from tav_opt.export.tensorrt import estimate
from tav_opt.repository.specs import GraphSpec

if TYPE_CHECKING:
    from tav_opt.export.tensorrt.build import _Maker

Traced = Callable[[], tuple[TorchEngine, list[Graph]]]
"""The clip in eager PyTorch, and its base's own graphs; loaded when first asked for."""


def export(maker: _Maker, traced: Traced, further: list[Further]) -> None:
    """Builds what the folders of the plan's cards lack; raises as `build.export` does."""
    cards = maker.plan.cards
    lacking = {card: beside.lacking(maker.folder(card), maker.exported, further).makeable for card in cards}
    if not any(lacking.values()):
        return
    estimate.check_host(maker.exported / "unet.onnx.data")
    rows = {card: {name: maker.rows_of_added[name] for name in names} for card, names in lacking.items() if names}
    needs = {card: maker.check_memory([card], rows_of_names) for card, rows_of_names in rows.items()}
    every = list(dict.fromkeys(name for names in rows.values() for name in names))
    made = {graph.name: graph for graph in beside.again(every, maker.exported, further, *traced())}
    parities = maker.check_graphs(made)
    for card, names in rows.items():
        make = partial(_make, maker, card, needs[card], parities)
        beside.add(maker.folder(card), maker.exported, [made[name] for name in names], make, maker.on_progress)


def _make(
    maker: _Maker,
    card: str,
    needs: Mapping[str, int],
    parities: Mapping[str, dict[str, float]],
    graph: Graph,
    folder: Path,
) -> dict[str, object]:
    """Builds the engines of one graph into a folder; raises ParityError."""
    compared: dict[str, dict[str, float]] = {}
    told: dict[str, list[dict[str, Any]]] = {}
    for rows in maker.rows_of_added[graph.name]:
        name = tensorrt_library.engine_file(graph.name, rows)
        (folder / name).write_bytes(maker.built(graph.name, rows, card))
        if maker.plan.runs_here(card):
            compared[name] = maker.compared(graph, rows, card, folder / name)
        told[name] = [asdict(tensor) for tensor in maker.tensors(graph.name, rows)]
    found = {"parity_of_graphs": parities[graph.name], "parity_of_engines": compared}
    return {"needs": needs[graph.name], "engines": told, **found}


def rows_of(spec: GraphSpec, own: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """How long the first axis of each engine is: as of the base's own, whose are `own`.

    Under attention control the source is a third row, which the others need in the same call.
    """
    if not spec.is_unet:
        return own["vae_decoder"]
    return (3,) if {*CONTROL} <= {*spec.further} else own["unet"]
