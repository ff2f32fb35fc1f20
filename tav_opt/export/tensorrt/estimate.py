"""What building and running an engine needs in memory, from the graph, before anything is started."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from tav_opt.config import InputError
from tav_opt.engines.tensorrt_library import Library
from tav_opt.export.tensorrt.builder import Network

# The most that any card of an architecture has, in GiB, where the card itself is not here to be asked.
LARGEST = {"sm75": 48, "sm80": 80, "sm86": 48, "sm89": 48, "sm120": 96, "sm121": 128}
_HOST_FACTOR = 4
"""Peak host memory over the weights of the fp32 graph, of conversion and build: measured with SD 1.5, see README."""
_HOST_BASE = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Bytes on the GPU while an engine runs, as if nothing were fused: an upper bound."""

    weights: int
    activations: int
    """The most that is alive at once."""
    largest: int
    """The largest single tensor: with standard attention at large sizes, its scores."""

    @property
    def total(self) -> int:
        return self.weights + self.activations


def needed(parsed: Network, weights: int) -> Needed:
    """Walks the parsed layers in order; a tensor lives from the layer that makes it to the last that reads it."""
    layers = parsed.layers
    last: dict[str, int] = {}
    for number, layer in enumerate(layers):
        last |= {tensor.name: number for tensor in _tensors(layer, "input")}
    alive: dict[str, int] = {}
    most = largest = 0
    constant = parsed.library.trt.LayerType.CONSTANT
    for number, layer in enumerate(layers):
        if layer.type != constant:  # counted as weights
            alive |= {tensor.name: _bytes(tensor) for tensor in _tensors(layer, "output")}
            largest = max([largest, *(_bytes(tensor) for tensor in _tensors(layer, "output"))])
        most = max(most, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last.get(name, number) > number}
    return Needed(weights=weights, activations=most, largest=largest)


def _tensors(layer: Any, kind: str) -> Iterable[Any]:
    get = getattr(layer, f"get_{kind}")
    found = (get(i) for i in range(getattr(layer, f"num_{kind}s")))
    return [tensor for tensor in found if tensor is not None]


def _bytes(tensor: Any) -> int:
    return int(max(0, math.prod(tensor.shape)) * tensor.dtype.itemsize)


def check_gpu(need: Needed, library: Library, card: str, graph: str) -> None:
    """Raises InputError when no card of the architecture, or not the present one, has what an engine may need."""
    architecture = card.rsplit("-", 1)[-1]
    if library.builds_without_gpu:
        has, whose = LARGEST.get(architecture, math.inf) * 2**30, f"the largest {architecture} has"
    else:
        has, whose = torch.cuda.mem_get_info()[0], f"{card} has free"
    if need.total > has:
        raise InputError(
            f"{graph}: an engine needs up to {need.total / 2**30:.1f} GiB ({need.largest / 2**30:.1f} GiB for one "
            f"tensor), {whose} {has / 2**30:.1f} GiB: --target tensorrt with its plugin keeps no attention scores; "
            f"else export fewer frames or a smaller size"
        )


def host_bytes(weights: Path) -> int:
    """Host memory that the export of a graph with these fp32 weights takes at its peak."""
    return _HOST_BASE + _HOST_FACTOR * weights.stat().st_size


def check_host(weights: Path) -> None:
    """Raises InputError, saying how much is needed, where the export of a graph with these weights has too little."""
    need, free = host_bytes(weights), psutil.virtual_memory().available
    if need > free:
        raise InputError(
            f"building {weights.stem} needs about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB is free"
        )
