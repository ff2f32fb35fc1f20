"""What an ONNX graph needs beside its weights while it runs, counted from the shapes in its file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

_KEYS_AND_VALUES = 4
"""Values that the body of our attention holds per value of its keys: keys and values of two frames."""
_VIEWS = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"))
_NOTHING = np.zeros(2, np.int64)
_MARGIN = 2
"""Arenas grow by doubling, and convolutions keep a copy of their input: measured, tests/test_working_memory.py."""


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes that live at once at each node of a graph: a fixed part and one per item of the free first axis."""

    fixed: np.ndarray
    per_item: np.ndarray

    def bytes(self, items: int) -> int:
        """At the peak of a run on so many items; 0 for none."""
        return int(_MARGIN * (self.fixed + items * self.per_item).max()) if items else 0

    @classmethod
    def of(cls, path: Path) -> WorkingMemory:
        """Counts a graph whose file tells the shape of every tensor, as those of `tav_opt.export` do."""
        graph = onnx.load(path, load_external_data=False).graph
        sizes = {value.name: _size(value) for value in (*graph.input, *graph.value_info, *graph.output)}
        owner = _owners(graph.node)
        last = {owner.get(name, name): index for index, node in enumerate(graph.node) for name in node.input}
        last |= {owner.get(value.name, value.name): len(graph.node) for value in graph.output}
        # Inputs without a free axis are a clip's values, which are counted with the clip.
        alive = {value.name: sizes[value.name] for value in graph.input if sizes[value.name][1]}
        now, peaks = sum(alive.values(), start=_NOTHING), []
        for index, node in enumerate(graph.node):
            made = {name: sizes.get(name, _NOTHING) for name in node.output if name and name not in owner}
            alive |= made
            now = now + sum(made.values(), start=_NOTHING)
            inside = _KEYS_AND_VALUES * sizes[node.input[1]] if node.domain == "tav_opt" else _NOTHING
            peaks.append(now + inside)
            for name in {owner.get(name, name) for name in (*node.input, *node.output)} & set(alive):
                if last.get(name, index) <= index:
                    now = now - alive.pop(name)
        return cls(*np.stack(peaks).T)


def weights_bytes(path: Path) -> int:
    """Of a graph in ONNX with all the weights that it reads, in whichever files they lie."""
    model = onnx.load(path, load_external_data=False)
    outside = [one for one in model.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
    lengths = [int(entry.value) for one in outside for entry in one.external_data if entry.key == "length"]
    return path.stat().st_size + sum(lengths)


def _owners(nodes: Iterable[Any]) -> dict[str, str]:
    """For every tensor that is only another view of one: the one whose memory it is."""
    owner: dict[str, str] = {}
    for node in nodes:
        if node.op_type in _VIEWS:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
    return owner


def _size(value: Any) -> np.ndarray:
    """Bytes of a tensor: (fixed, per item)."""
    tensor = value.type.tensor_type
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    dims = tensor.shape.dim
    count = math.prod(dim.dim_value for dim in dims if not dim.dim_param)
    free = [dim.dim_param for dim in dims if dim.dim_param]
    if not free:
        return np.array([count * itemsize, 0])
    return np.array([0, count * itemsize * math.prod(_per_item(text) for text in free)])


def _per_item(text: str) -> int:
    """The factor in `b`, `4*b`, `b*4`."""
    return math.prod(int(number) for number in re.findall(r"\d+", re.sub(r"[A-Za-z_]\w*", "", text)))
