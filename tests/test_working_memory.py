"""The count of a graph's working memory: by hand on a small one, and against what onnxruntime takes on a larger one."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tav_opt.memory.graph import _MARGIN, WorkingMemory


def save(path: Path, nodes: list, shapes: dict[str, list], weights: dict[str, np.ndarray]) -> Path:
    """A graph from `x` to `y`."""
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    inner = [value for name, value in values.items() if name not in ("x", "y")]
    graph = helper.make_graph(nodes, "g", [values["x"]], [values["y"]], initializers, value_info=inner)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_what_lives_at_once_is_counted(tmp_path):
    """a (2b, 5) is a view of x (b, 10); c and y (2b, 100) live at the peak, at the last node."""
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["b", "b"], ["c"]),
        helper.make_node("MatMul", ["c", "w"], ["y"]),
    ]
    shapes = {"x": ["b", 10], "a": ["2*b", 5], "b": ["2*b", 5], "c": ["b*2", 5], "y": ["2*b", 100]}
    weights = {"w": np.ones((5, 100), np.float32), "s": np.array([-1, 5])}
    memory = WorkingMemory.of(save(tmp_path / "g.onnx", nodes, shapes, weights))
    for b in (1, 7):
        assert memory.bytes(b) == int(_MARGIN * 4 * b * (10 + 200))
    assert memory.bytes(0) == 0


MEASURE = """
import sys, numpy, onnxruntime

def status(name):  # the peak (VmHWM) or the present (VmRSS), in bytes
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

session = onnxruntime.InferenceSession(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = status("VmRSS")
session.run(None, {"x": numpy.ones((int(sys.argv[2]), 32, 128, 128), numpy.float32)})
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("b", [8, 24])
def test_the_count_is_no_less_than_what_onnxruntime_takes(tmp_path, b):
    """Convolutions with a way around them, as in a UNet; nor is it several times as much."""
    names = ["x", *(f"h{n}" for n in range(6)), "y"]
    nodes, weights = [], {}
    for n, (before, after) in enumerate(itertools.pairwise(names[:-1])):
        weights[f"w{n}"] = np.random.default_rng(n).normal(size=(32, 32, 3, 3)).astype(np.float32)
        nodes.append(helper.make_node("Conv", [before, f"w{n}"], [f"c{n}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Sigmoid", [f"c{n}"], [after]))
    nodes.append(helper.make_node("Add", [names[-2], "h0"], ["y"]))
    shape = ["b", 32, 128, 128]
    shapes = dict.fromkeys([*names, *(f"c{n}" for n in range(6))], shape)
    path = save(tmp_path / "g.onnx", nodes, shapes, weights)
    run = subprocess.run([sys.executable, "-c", MEASURE, path, str(b)], check=True, capture_output=True, text=True)
    measured, counted = int(run.stdout), WorkingMemory.of(path).bytes(b)
    assert measured <= counted <= 4 * measured, (measured, counted)
