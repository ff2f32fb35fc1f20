"""The fp16 graphs that engines are made of: where they are fp32, the plugin's node, rounding, departing layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
from exported import FRAMES, Exported, export_once, half_unet
from onnx import TensorProto

from tav_opt.export import half, layers, parity
from tav_opt.export.rounding import cast_to, rounded
from tav_opt.repository import specs

pytest.importorskip("polygraphy")


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def unet(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_unet(exported, tmp_path_factory.mktemp("half"))


def check(model: onnx.ModelProto, beside: Path) -> None:
    """ONNX's own checker, which looks for the weights beside the file."""
    path = beside.with_name("checked.onnx")
    onnx.save(model, path)
    onnx.checker.check_model(path, full_check=True)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of all tensors, as ONNX's own strict inference finds them."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    graph = inferred.graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return found | {i.name: i.data_type for i in graph.initializer}


def test_the_graph_is_fp16_but_for_its_islands(exported: Exported, unet: Path) -> None:
    model = half.fixed(unet, 2, "standard")
    check(model, unet)
    found = types(model)
    values = set(specs.value_inputs(exported.base).values())
    for tensor in model.graph.input:
        kind = TensorProto.FLOAT16 if tensor.name in values else TensorProto.FLOAT
        assert found[tensor.name] == (TensorProto.INT64 if tensor.name == "timestep" else kind), tensor.name
    wide = {"InstanceNormalization", "Softmax", "Sin", "Cos"}
    for node in model.graph.node:
        if node.op_type in wide:
            assert found[node.input[0]] == found[node.output[0]] == TensorProto.FLOAT, node.name
        if node.op_type in ("Conv", "MatMul", "Gemm", "SparseCausalAttention"):
            assert all(found[name] == TensorProto.FLOAT16 for name in node.input if name), node.name
    assert wide <= {node.op_type for node in model.graph.node}


def test_the_sinusoid_is_whole(unet: Path) -> None:
    """Nothing between the timestep and its sines is rounded to fp16, where phases near 999 count in halves."""
    model = half.fixed(unet, 1, "standard")
    producers = {name: node for node in model.graph.node for name in node.output}
    waiting = [node for node in model.graph.node if node.op_type in ("Sin", "Cos")]
    while waiting:
        node = waiting.pop()
        assert cast_to(node) != TensorProto.FLOAT16, node.name
        waiting += [producers[name] for name in node.input if name in producers]


def test_the_plugin_graph_has_the_nodes_and_nothing_of_their_body(exported: Exported, unet: Path) -> None:
    plugin, standard = half.fixed(unet, 2, "plugin"), half.fixed(unet, 2, "standard")
    names = specs.value_inputs(exported.base)
    attentions = sum(name.endswith("attn1.to_q.weight") for name in names)
    nodes = [node for node in plugin.graph.node if node.domain == "tav_opt"]
    assert len(nodes) == attentions > 0 and not plugin.functions
    for node in nodes:
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        wanted = {"frames": FRAMES, "heads": 4, "plugin_namespace": b"tav_opt", "plugin_version": b"1", "aot": 1}
        assert found == wanted
    counts = [Counter(node.op_type for node in model.graph.node) for model in (plugin, standard)]
    assert counts[1]["Softmax"] - counts[0]["Softmax"] == attentions
    assert counts[1]["MatMul"] - counts[0]["MatMul"] == 2 * attentions
    assert counts[1]["SparseCausalAttention"] == 0


def test_shapes_are_static(unet: Path) -> None:
    for rows in (1, 2):
        model = half.fixed(unet, rows, "standard")
        for tensor in (*model.graph.input, *model.graph.output):
            assert all(axis.dim_value > 0 for axis in tensor.type.tensor_type.shape.dim), tensor.name


def test_a_baked_graph_has_the_values_inside(exported: Exported, unet: Path) -> None:
    model = half.fixed(unet, 1, "standard")
    name = model.graph.input[3].name
    shape = [axis.dim_value for axis in model.graph.input[3].type.tensor_type.shape.dim]
    half.bake(model, [onnx.numpy_helper.from_array(np.ones(shape, np.float16), name)])
    check(model, unet)
    assert name in {i.name for i in model.graph.initializer} - {i.name for i in model.graph.input}


def test_a_layer_that_departs_is_named(tmp_path: Path) -> None:
    """One constant in the middle is changed: the layer that reads it is the first to depart."""
    source = """
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2, 3] x) => (float[2, 3] y) <float[1] a = {2.0}, float[1] c = {CHANGED}> {
            first = Mul (x, a)
            second = Add (first, c)
            y = Mul (second, a)
        }
    """
    runners = []
    for name, value in (("reference", "1.0"), ("graph", "1.5")):
        path = tmp_path / f"{name}.onnx"
        onnx.save(onnx.parser.parse_model(source.replace("CHANGED", value)), path)
        runners.append(layers.marked_runner(path, tmp_path))
    found = layers.by_layer(*runners, {"x": np.ones((2, 3), np.float32)})
    assert [d.tensor for d in found] == ["first", "second", "y"]
    assert [round(d.error, 3) for d in found] == [0, round(0.5 / 3, 3), round(1 / 6, 3)]
    assert parity.first_departure(found, 1e-2).startswith("second is the first layer that departs")


ROUNDED = """
    <ir_version: 10, opset_import: ["" : 20]>
    g (float16[3, 5] x, float[3, 5] wide) => (float[3, 5] out, float16[3, 5] narrow) <float[1] thousand = {1000.0}> {
        c = Cast <to = 10> (thousand)
        big = Add (x, c)
        lost = Sub (big, c)
        size = Abs (lost)
        sharp = Sqrt (size)
        turned = Transpose <perm = [1, 0]> (sharp)
        back = Transpose <perm = [1, 0]> (turned)
        single = Cast <to = 1> (back)
        island = Div (single, wide)
        again = Cast <to = 10> (island)
        like = CastLike (wide, x)
        narrow = Mul (again, like)
        out = Cast <to = 1> (narrow)
    }
"""


def test_rounding_is_that_of_true_fp16() -> None:
    """Bit for bit what numpy makes of the same graph in float16, where onnxruntime alone keeps more."""
    model = onnx.parser.parse_model(ROUNDED)
    generator = np.random.default_rng(0)
    feed = {
        "x": generator.standard_normal((3, 5)).astype(np.float16),
        "wide": generator.uniform(1, 2, (3, 5)).astype(np.float32),
    }
    truth = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    unrounded = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    assert not np.array_equal(unrounded[0], truth[0]), "onnxruntime rounds by itself: the emulation can go"
    found = onnxruntime.InferenceSession(rounded(model).SerializeToString()).run(None, feed)
    for value, expected in zip(found, truth, strict=True):
        np.testing.assert_array_equal(value, expected.astype(np.float32))
