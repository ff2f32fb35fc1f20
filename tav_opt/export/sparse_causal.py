"""The ONNX node of sparse-causal attention, and what it is made of for runtimes that do not know it."""

from __future__ import annotations

from typing import Any, Literal

import onnx
import onnx_ir as ir
from onnxscript import values

DOMAIN = "tav_opt"
NAME = "SparseCausalAttention"
OPSET = 20

Body = Literal["onnxruntime", "standard"]
"""onnxruntime: its fused attention, whose memory is linear in n. standard: ONNX operators only; scores are n × 2n,
and their softmax is fp32 in every precision."""

_FORMAL = onnx.defs.OpSchema.FormalParameter
_ATTRIBUTE = onnx.defs.OpSchema.Attribute
_INT = onnx.defs.OpSchema.AttrType.INT
_SCHEMA = onnx.defs.OpSchema(
    NAME,
    DOMAIN,
    1,
    doc="Frame i attends to frames 0 and i-1 (Tune-A-Video equation 4).",
    inputs=[_FORMAL(name, "T", "(b frames) n (heads d)") for name in ("q", "k", "v")],
    outputs=[_FORMAL("out", "T", "(b frames) n (heads d)")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
    attributes=[_ATTRIBUTE(name, _INT, "") for name in ("frames", "heads")],
)
_node = values.Op(values.Opset(DOMAIN, 1), NAME, _SCHEMA)


def translate(q: Any, k: Any, v: Any, frames: int, heads: int) -> Any:
    """What the exporter writes for `torch.ops.tav_opt.sparse_causal_attention`: the one node."""
    return _node(q, k, v, frames=frames, heads=heads)


def _first_and_previous(x: str) -> str:
    """Keys or values of frames 0 and i-1 for frame i: (b f) n c → (b f) 2n c, named `x_seen`."""
    return f"""
        {x}_size = Shape <start = 1> ({x})
        {x}_by_clip = Concat <axis = 0> (minus_one, clip_frames, {x}_size)
        {x}_clips = Reshape ({x}, {x}_by_clip)
        {x}_first = Slice ({x}_clips, zero, one, one)
        {x}_before = Slice ({x}_clips, zero, minus_one, one)
        {x}_previous = Concat <axis = 1> ({x}_first, {x}_before)
        {x}_clips_size = Shape ({x}_clips)
        {x}_firsts = Expand ({x}_first, {x}_clips_size)
        {x}_both = Concat <axis = 2> ({x}_firsts, {x}_previous)
        {x}_batch = Shape <start = 0, end = 1> ({x})
        {x}_width = Shape <start = 2> ({x})
        {x}_folded = Concat <axis = 0> ({x}_batch, minus_one, {x}_width)
        {x}_seen = Reshape ({x}_both, {x}_folded)
    """


_ATTENTION: dict[Body, str] = {
    "onnxruntime": "out = com.microsoft.MultiHeadAttention <num_heads: int = @heads> (q, k_seen, v_seen)",
    "standard": """
        head_count = Constant <value_int: int = @heads> ()
        heads_1 = Reshape (head_count, one)
        same = Constant <value_ints = [0, 0]> ()
        by_head = Concat <axis = 0> (same, heads_1, minus_one)
        q_split = Reshape (q, by_head)
        k_split = Reshape (k_seen, by_head)
        v_split = Reshape (v_seen, by_head)
        q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
        k_heads = Transpose <perm = [0, 2, 3, 1]> (k_split)
        v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
        head_width = Shape <start = 3> (q_heads)
        head_width_like = CastLike (head_width, q)
        root = Sqrt (head_width_like)
        q_scaled = Div (q_heads, root)
        scores = MatMul (q_scaled, k_heads)
        scores_single = Cast <to = 1> (scores)
        weights_single = Softmax <axis = -1> (scores_single)
        weights = CastLike (weights_single, q)
        heads_out = MatMul (weights, v_heads)
        out_split = Transpose <perm = [0, 2, 1, 3]> (heads_out)
        out_size = Shape (q)
        out = Reshape (out_split, out_size)
    """,
}


def function_body(body: Body) -> onnx.FunctionProto:
    """The function that stands for the node where a runtime has no kernel of its own."""
    return onnx.parser.parse_function(f"""
        <domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "com.microsoft" : 1]>
        {NAME} <frames, heads> (q, k, v) => (out) {{
            frame_count = Constant <value_int: int = @frames> ()
            zero = Constant <value_ints = [0]> ()
            one = Constant <value_ints = [1]> ()
            minus_one = Constant <value_ints = [-1]> ()
            clip_frames = Reshape (frame_count, one)
            {_first_and_previous("k")}
            {_first_and_previous("v")}
            {_ATTENTION[body]}
        }}
    """)


def append_body(model: ir.Model, body: Body, *further: onnx.FunctionProto) -> None:
    """Gives the model the functions that its own nodes call, attention's with such a body, in place."""
    for proto in (function_body(body), *further):
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    if body == "onnxruntime":
        model.opset_imports["com.microsoft"] = 1
