"""The node that stands for group norms over clips, by each of its bodies, against the definition in float64."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from exported import FRAMES, Exported, export_once
from onnx import TensorProto, helper

from tav_opt.export import clip_norm, sparse_causal

EPSILON = 1e-5


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


def model_of(body: sparse_causal.Body, frames: int, groups: int, kind: int) -> onnx.ModelProto:
    """One node, at any batch, width and size."""
    shapes = {"x": ["bf", "c", "h", "w"], "weight": ["c"], "bias": ["c"], "y": ["bf", "c", "h", "w"]}
    told = {name: helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()}
    settings = {"frames": frames, "groups": groups, "epsilon": EPSILON}
    node = helper.make_node(clip_norm.NAME, ["x", "weight", "bias"], ["y"], domain=sparse_causal.DOMAIN, **settings)
    return helper.make_model(
        helper.make_graph([node], "norm", [told[name] for name in node.input], [told["y"]]),
        opset_imports=[helper.make_opsetid("", sparse_causal.OPSET), helper.make_opsetid(sparse_causal.DOMAIN, 1)],
        functions=[clip_norm.function_body(body)],
        ir_version=10,
    )


def definition(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, frames: int, groups: int) -> np.ndarray:
    """Mean and variance over a group's channels, all frames and pixels."""
    bf, c, h, w = x.shape
    grouped = x.astype(np.float64).reshape(-1, frames, groups, c // groups, h, w)
    over = (1, 3, 4, 5)
    normal = (grouped - grouped.mean(over, keepdims=True)) / np.sqrt(grouped.var(over, keepdims=True) + EPSILON)
    return normal.reshape(bf, c, h, w) * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("body", ["onnxruntime", "standard"])
@pytest.mark.parametrize(
    ("b", "frames", "groups", "c", "size"), [(1, 1, 1, 2, (1, 3)), (2, 3, 4, 12, (5, 4)), (3, 2, 2, 4, (7, 1))]
)
def test_a_body_is_a_norm_over_the_frames_of_each_clip(body, b, frames, groups, c, size):
    """Of clips that differ, with a mean that is ten times the deviation; a constant one has no variance below zero."""
    model = model_of(body, frames, groups, TensorProto.FLOAT)
    onnx.checker.check_model(model)
    random = np.random.default_rng(0)
    x = (random.normal(size=(b * frames, c, *size)) * 3 + 30).astype(np.float32)
    x[:frames, : c // groups] = 1000.1
    weight, bias = random.normal(size=(2, c)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(
        None, {"x": x, "weight": weight, "bias": bias}
    )
    truth = definition(x, weight, bias, frames, groups)
    varied = np.ones_like(x, bool)
    varied[:frames, : c // groups] = False
    np.testing.assert_allclose(found[varied], truth[varied], atol=3e-4)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("body", ["onnxruntime", "standard"])
def test_statistics_of_halves_are_single(body):
    """The sum of these squares is beyond fp16, whose largest value is 65504."""
    model = model_of(body, 2, 2, TensorProto.FLOAT16)
    x = (np.random.default_rng(0).normal(size=(4, 8, 16, 16)) * 20).astype(np.float16)
    ones, zeros = np.ones(8, np.float16), np.zeros(8, np.float16)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(
        None, {"x": x, "weight": ones, "bias": zeros}
    )
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, definition(x, ones, zeros, 2, 2), atol=4e-3)


def test_every_norm_of_a_unet_is_one_node(exported):
    """Those of resnets and the last one are over clips, those of transformers over a frame; none is left as it was."""
    model = onnx.load(exported.base / "unet.onnx", load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == clip_norm.NAME]
    frames = {next(a.i for a in node.attribute if a.name == "frames") for node in nodes}
    assert len(nodes) > 3 and frames == {1, FRAMES}
    assert "InstanceNormalization" not in {node.op_type for node in model.graph.node}
