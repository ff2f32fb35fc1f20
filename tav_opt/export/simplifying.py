"""The graph that the exporter writes, made simpler as it would itself, but for a slow rule that finds nothing here."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules

RULES = (
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_gemm_rule,
)
"""Of onnxscript's own rules those for networks like ours. `slice_split_rule` is not among them: it looks at every two
slices of a graph, four seconds of a UNet's six, and the exporter writes no such pairs."""
ROUNDS = 2
"""As onnxscript does: folded constants make rules fit, and the other way round."""


def simplify(model: ir.Model) -> None:
    """Folds constants, applies the rules, and takes out what is unused or there twice; in place."""
    optimizer.inline(model)
    for _ in range(ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True)
        rewrite(model, RULES)
    for rest in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        rest(model)
