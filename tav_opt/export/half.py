"""The fp16 graph: half precision everywhere, but for fp32 islands where a measured error asks for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

import onnx
import onnx.inliner
from onnx import ModelProto, NodeProto, TensorProto

from tav_opt.engines.onnxruntime import load_onnxruntime
from tav_opt.export import clip_norm, sparse_causal
from tav_opt.export.rounding import cast_to

STATISTICS = ("InstanceNormalization", "Softmax")
"""Operators that stay in fp32: benchmarks/precision.py has the errors with and without each.

Softmax is as good in fp16 while its sum is fp32; where a compiler sums thousands of keys in fp16 one by one, it is
wrong (benchmarks/softmax.py), and TensorRT does not say how it sums.

LayerNormalization is none of them: its `stash_type` makes its statistics fp32 by the operator's own definition.
"""
SINUSOID = ("Sin", "Cos")
"""The timestep's embedding: its phases reach 999, where fp16 counts in halves."""

Attention = Literal["plugin", "onnxruntime", "standard"]
"""What stands for sparse-causal attention: a node that a plugin must know, or one of the function's bodies."""


def convert(model: ModelProto, values: Collection[str], islands: Iterable[str] = STATISTICS) -> ModelProto:
    """Converts a loaded fp32 graph, in place; a clip's `values` become fp16 inputs, all other inputs stay fp32."""
    load_onnxruntime()
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    kept = [tensor.name for tensor in (*model.graph.input, *model.graph.output) if tensor.name not in values]
    half = convert_float_to_float16(
        model,
        keep_io_types=kept,
        disable_shape_infer=True,  # the exporter wrote every type, and inference would stop at 2 GB
        op_block_list=list(islands),
        node_block_list=[node.name for node in _ancestors(model, SINUSOID)],
    )
    _join_islands(half)
    OnnxModel(half).topological_sort()  # the converter adds its casts at the end
    return half


def _join_islands(model: ModelProto) -> None:
    """Where one fp32 node feeds another, the converter rounds to fp16 and back in between; they are joined here."""
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    to = {name: cast_to(node) for name, node in casts.items()}
    joined = {
        name: casts[node.input[0]].input[0]
        for name, node in casts.items()
        if to[name] == TensorProto.FLOAT and to.get(node.input[0]) == TensorProto.FLOAT16
    }
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = joined.get(name, name)
    read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    for node in [node for name, node in casts.items() if name not in read]:
        model.graph.node.remove(node)


def _ancestors(model: ModelProto, op_types: Collection[str]) -> list[NodeProto]:
    """Nodes of these types and all that they are computed from."""
    producers = {output: node for node in model.graph.node for output in node.output}
    waiting = [node for node in model.graph.node if node.op_type in op_types]
    found: dict[str, NodeProto] = {}
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found[node.name] = node
            waiting += [producers[name] for name in node.input if name in producers]
    return list(found.values())


def write(source: Path, target: Path, values: Collection[str], islands: Iterable[str] = STATISTICS) -> Path:
    """Writes the fp16 graph of an exported fp32 one, its weights beside it in `<name>.data`, attention as it was."""
    save(convert(onnx.load(source), values, islands), target)
    return target


def save(model: ModelProto, path: Path) -> None:
    """Writes a graph and its weights beside it."""
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def fixed(path: Path, rows: int, attention: Attention) -> ModelProto:
    """A graph as one engine takes it: its free axis `rows` long, attention as asked; weights stay in their file."""
    model = onnx.load(path, load_external_data=False)
    for tensor in (*model.graph.input, *model.graph.output):
        for axis in tensor.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_value = rows
    del model.graph.value_info[:]  # shapes of any number of rows
    del model.functions[:]
    if attention == "plugin":
        _ask_for_plugin(model)
        model.functions.append(clip_norm.function_body("standard"))
    else:
        model.functions.extend(one.function_body(attention) for one in (sparse_causal, clip_norm))
    return onnx.inliner.inline_local_functions(model)  # the parsers name a function's nodes alike in every call


def _ask_for_plugin(model: ModelProto) -> None:
    """What TensorRT's parser looks a plugin up by, and that it shall be compiled ahead of time."""
    for node in model.graph.node:
        if node.op_type == sparse_causal.NAME:
            extra = {"plugin_namespace": sparse_causal.DOMAIN, "plugin_version": "1", "aot": 1}
            node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in extra.items())


def bake(model: ModelProto, values: Iterable[onnx.TensorProto]) -> None:
    """Makes a clip's values constants of the graph, in place: initializers under the names their inputs had."""
    names = []
    for value in values:
        model.graph.initializer.append(value)
        names.append(value.name)
    inputs = [tensor for tensor in model.graph.input if tensor.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
