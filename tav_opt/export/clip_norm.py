"""The ONNX node of group norms over clips, and what it is made of."""

from __future__ import annotations

from typing import Any

import onnx
from onnxscript import values

from tav_opt.export.sparse_causal import DOMAIN, OPSET, Body

NAME = "ClipGroupNorm"

_FORMAL = onnx.defs.OpSchema.FormalParameter
_ATTRIBUTE = onnx.defs.OpSchema.Attribute
_KIND = onnx.defs.OpSchema.AttrType
_SCHEMA = onnx.defs.OpSchema(
    NAME,
    DOMAIN,
    1,
    doc="GroupNorm with statistics over all frames of a clip.",
    inputs=[_FORMAL("x", "T", "(b frames) c h w"), _FORMAL("weight", "T", "c"), _FORMAL("bias", "T", "c")],
    outputs=[_FORMAL("y", "T", "(b frames) c h w")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
    attributes=[
        _ATTRIBUTE("frames", _KIND.INT, ""),
        _ATTRIBUTE("groups", _KIND.INT, ""),
        _ATTRIBUTE("epsilon", _KIND.FLOAT, ""),
    ],
)
_node = values.Op(values.Opset(DOMAIN, 1), NAME, _SCHEMA)


def translate(x: Any, weight: Any, bias: Any, frames: int, groups: int, eps: float) -> Any:
    """What the exporter writes for `torch.ops.tav_opt.clip_group_norm`: the one node."""
    return _node(x, weight, bias, frames=frames, groups=groups, epsilon=eps)


_BODIES: dict[Body, str] = {
    # A batch norm whose channels are the channels of all frames, each with the statistics of its clip's group: nothing
    # is transposed, and x is read three times and written once.
    "onnxruntime": """
        single = Cast <to = 1> (x)
        rows = Constant <value_ints = [0, 0, -1]> ()
        flat = Reshape (single, rows)
        pixels = Shape <start = 2> (flat)
        count = Cast <to = 1> (pixels)
        last = Constant <value_ints = [2]> ()
        mean_of_row = ReduceMean <keepdims = 0> (flat, last)
        sum_of_row = ReduceSumSquare <keepdims = 0> (flat, last)
        square_of_row = Div (sum_of_row, count)
        width = Div (channels, group_count)
        by_group = Concat <axis = 0> (minus_one, clip_frames, group_count, width)
        means = Reshape (mean_of_row, by_group)
        squares = Reshape (square_of_row, by_group)
        of_clip = Constant <value_ints = [1, 3]> ()
        mean = ReduceMean <keepdims = 1> (means, of_clip)
        square = ReduceMean <keepdims = 1> (squares, of_clip)
        mean_squared = Mul (mean, mean)
        difference = Sub (square, mean_squared)
        none = Constant <value_float = 0.0> ()
        variance = Max (difference, none)
        spread = Shape (means)
        mean_spread = Expand (mean, spread)
        variance_spread = Expand (variance, spread)
        mean_each = Reshape (mean_spread, minus_one)
        variance_each = Reshape (variance_spread, minus_one)
        one_clip = Concat <axis = 0> (group_count, width)
        weight_single = Cast <to = 1> (weight)
        bias_single = Cast <to = 1> (bias)
        weight_groups = Reshape (weight_single, one_clip)
        bias_groups = Reshape (bias_single, one_clip)
        weight_spread = Expand (weight_groups, spread)
        bias_spread = Expand (bias_groups, spread)
        weight_each = Reshape (weight_spread, minus_one)
        bias_each = Reshape (bias_spread, minus_one)
        one = Constant <value_ints = [1]> ()
        as_channels = Concat <axis = 0> (one, minus_one, pixels)
        wide = Reshape (single, as_channels)
        normal = BatchNormalization <epsilon: float = @epsilon>
            (wide, weight_each, bias_each, mean_each, variance_each)
        y_single = Reshape (normal, x_size)
        y = CastLike (y_single, x)
    """,
    "standard": """
        inside = Shape <start = 1> (x)
        by_clip = Concat <axis = 0> (minus_one, clip_frames, inside)
        clips = Reshape (x, by_clip)
        channels_first = Transpose <perm = [0, 2, 1, 3, 4]> (clips)
        same = Constant <value_ints = [0]> ()
        by_group = Concat <axis = 0> (same, group_count, minus_one)
        grouped = Reshape (channels_first, by_group)
        single = Cast <to = 1> (grouped)
        ones = ConstantOfShape <value = float[1] {1.0}> (group_count)
        zeros = ConstantOfShape <value = float[1] {0.0}> (group_count)
        normal_single = InstanceNormalization <epsilon: float = @epsilon> (single, ones, zeros)
        normal_grouped = CastLike (normal_single, x)
        clips_size = Shape (channels_first)
        normal = Reshape (normal_grouped, clips_size)
        by_channel = Constant <value_ints = [-1, 1, 1, 1]> ()
        weight_of = Reshape (weight, by_channel)
        bias_of = Reshape (bias, by_channel)
        scaled = Mul (normal, weight_of)
        shifted = Add (scaled, bias_of)
        frames_first = Transpose <perm = [0, 2, 1, 3, 4]> (shifted)
        y = Reshape (frames_first, x_size)
    """,
}
"""Both have their statistics, and onnxruntime's all of it, in fp32 in every precision."""


def function_body(body: Body) -> onnx.FunctionProto:
    """The function that stands for the node: no runtime has a kernel of it."""
    return onnx.parser.parse_function(f"""
        <domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
        {NAME} <frames, groups, epsilon> (x, weight, bias) => (y) {{
            frame_number = Constant <value_int: int = @frames> ()
            group_number = Constant <value_int: int = @groups> ()
            minus_one = Constant <value_ints = [-1]> ()
            clip_frames = Reshape (frame_number, minus_one)
            group_count = Reshape (group_number, minus_one)
            x_size = Shape (x)
            channels = Shape <start = 1, end = 2> (x)
            {_BODIES[body]}
        }}
    """)
