"""An fp16 graph as a CPU can show it: every fp16 value is a rounded fp32 one, sums are fp32 as in matrix units.

onnxruntime has few fp16 kernels for CPUs: it runs neighbouring nodes in fp32 and rounds at the end of them only, so
that an fp16 graph seems better there than it is.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto
from onnx.helper import make_node

_MOVES = {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
_MOVES |= {"Unsqueeze"}
"""Operators that compute nothing: what goes in rounded comes out rounded."""
_NOT_FLOAT = {"Equal", "Greater", "IsInf", "IsNaN", "Less", "Shape", "Size"}


def cast_to(node: NodeProto) -> int:
    """The element type that a Cast gives; 0 for any other node."""
    return next((a.i for a in node.attribute if a.name == "to"), 0) if node.op_type == "Cast" else 0


def rounded(model: ModelProto) -> ModelProto:
    """Makes a flat fp16 graph one of fp32 nodes that round to fp16 and back, in place; names of tensors stay.

    Inputs and weights stay fp16. Every operator but Cast and CastLike counts as fp16 when one of its inputs is.
    """
    graph = model.graph
    narrow = {i.name for i in graph.input if i.type.tensor_type.elem_type == TensorProto.FLOAT16}
    narrow |= {i.name for i in graph.initializer if i.data_type == TensorProto.FLOAT16}
    wide = {name: f"{name}_wide" for name in narrow}
    nodes = [make_node("Cast", [name], [wide[name]], to=TensorProto.FLOAT) for name in sorted(narrow)]
    for node in graph.node:
        nodes += _rounding(node, narrow, wide)
    del graph.node[:]
    graph.node.extend(nodes)
    for output in graph.output:
        if output.name in narrow:
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def _rounding(node: NodeProto, narrow: set[str], wide: dict[str, str]) -> list[NodeProto]:
    """The nodes that stand for one; `narrow` learns which of its outputs are fp16."""
    is_narrow = _is_narrow(node, narrow)
    from_narrow = bool(node.input) and node.input[0] in narrow
    inputs = [wide.get(name, name) for name in node.input]
    if not is_narrow:
        if from_narrow and cast_to(node) == TensorProto.FLOAT:
            return [make_node("Identity", inputs, node.output)]
        node.input[:] = inputs
        return [node]
    narrow.update(node.output)
    if node.op_type == "Constant":
        (name,) = node.output
        node.output[0] = f"{name}_half"
        return [node, make_node("Cast", [node.output[0]], [name], to=TensorProto.FLOAT)]
    if node.op_type in ("Cast", "CastLike"):
        return _pair(inputs[0], node.output[0])
    node.input[:] = inputs
    if node.op_type in _MOVES:
        return [node]
    names = list(node.output)
    node.output[:] = [f"{name}_exact" if name else "" for name in names]
    return [node, *(pair for name in names if name for pair in _pair(f"{name}_exact", name))]


def _is_narrow(node: NodeProto, narrow: set[str]) -> bool:
    """Whether a node gives fp16."""
    match node.op_type:
        case "Cast":
            return cast_to(node) == TensorProto.FLOAT16
        case "CastLike":
            return node.input[1] in narrow
        case "Constant":
            return any(a.name == "value" and a.t.data_type == TensorProto.FLOAT16 for a in node.attribute)
    return node.op_type not in _NOT_FLOAT and any(name in narrow for name in node.input)


def _pair(source: str, name: str) -> list[NodeProto]:
    half = f"{name}_half"
    return [
        make_node("Cast", [source], [half], to=TensorProto.FLOAT16),
        make_node("Cast", [half], [name], to=TensorProto.FLOAT),
    ]
