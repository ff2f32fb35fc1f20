"""Run by test_tensorrt_plugin.py in a process of its own: our plugin through TensorRT's own Python code.

The Python half of TensorRT's bindings runs over stand-ins for their compiled half: classes are made when asked for,
members of enumerations are their names. The truth is the vendor's reading of signatures and of what `aot_impl` returns.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from types import SimpleNamespace as Struct
from typing import Any, ClassVar

import numpy as np
import torch


class Member(type):
    """Any attribute is a member of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class Dims(tuple):
    MAX_DIMS = 8

    def __new__(cls, dims: Any = ()) -> Dims:
        return super().__new__(cls, () if isinstance(dims, int) else dims)


class DimsExprs(list):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Registry:
    creators: ClassVar[dict[str, Any]] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        self.creators[creator.plugin_namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[namespace]


def stand_in() -> Any:
    """A module `tensorrt` whose `plugin` is the vendor's."""
    trt: Any = types.ModuleType("tensorrt")
    made: dict[str, Any] = {}

    def lookup(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in made:
            body = {"__init__": lambda self, *_a, **k: self.__dict__.update(k), "log": lambda *_: None}
            made[name] = Member(name, (), body)
        return made[name]

    trt.__getattr__ = lookup
    trt.Dims, trt.DimsExprs, trt.get_plugin_registry = Dims, DimsExprs, Registry
    trt.float16, trt.float32, trt.bfloat16 = "HALF", "FLOAT", "BF16"
    found = importlib.util.find_spec("tensorrt_bindings")
    assert found is not None
    trt.__path__ = found.submodule_search_locations
    return trt


trt = sys.modules["tensorrt"] = stand_in()


class Constant(trt.IDimensionExpr):
    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Expressions:
    """What builds symbolic integers: all of them constants, as shapes are static."""

    def constant(self, value: int) -> Constant:
        return Constant(value)

    def operation(self, kind: str, first: Constant, second: Constant) -> Constant:
        assert kind == "DimensionOperation.SUM", kind
        return Constant(first.value + second.value)


class Described(trt.DynamicPluginTensorDesc):
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.desc = Struct(dims=Dims(shape), type="HALF", format="LINEAR", scale=1.0)


class Scalars(dict):
    """Takes what stands between the input and output pointers."""


def created(frames: int, heads: int) -> Any:
    """The plugin as the ONNX parser makes it from a node's attributes."""
    fields = [Struct(name="frames", data=np.array([frames])), Struct(name="heads", data=np.array([heads]))]
    creator = Registry().get_creator("SparseCausalAttention", "1", "tav_opt")
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    return creator.create_plugin("SparseCausalAttention", "tav_opt", fields, None, request)


def main() -> None:
    from tensorrt.plugin._lib import QDP_REGISTRY

    from tav_opt.export.tensorrt import plugin as tensorrt_plugin
    from tav_opt.export.tensorrt.plugin_kernel import plugin_kernel

    definition = QDP_REGISTRY["tav_opt::SparseCausalAttention"]
    assert definition.input_tensor_names == ["q", "k", "v"], definition.input_tensor_names
    assert definition.input_attrs == {"frames": int, "heads": int}, definition.input_attrs
    assert definition.num_outputs == 1
    assert definition.aot_impl_attr_names == ["frames", "heads"]

    shape, frames, heads, arch = (8, 256, 320), 4, 8, 89
    tensorrt_plugin.for_architecture(arch)
    plugin = created(frames, heads)
    assert plugin.attrs == {"frames": frames, "heads": heads}, plugin.attrs
    assert plugin.get_output_data_types(["HALF"] * 3, [3] * 3) == ["HALF"]
    expressions = [[Constant(x) for x in shape]] * 3
    (out,) = plugin.get_output_shapes(expressions, [], Expressions())
    assert [e.value for e in out] == list(shape)

    plugin.set_tactic(0)
    launch, scalars = Struct(), Scalars()
    plugin.get_launch_params(expressions, [Described(shape) for _ in range(4)], 3, launch, scalars, Expressions())
    kernel = plugin_kernel(shape, torch.float16, frames, heads, arch)
    sizes = [getattr(launch, name) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")]
    assert tuple(x.expr.value for x in sizes) == (*kernel.grid, *kernel.block)
    assert launch.shared_mem.expr.value == kernel.shared
    assert scalars.nbSymExprs == len(kernel.scalars)
    assert tuple(scalars[i].expr.value for i in range(len(scalars))) == kernel.scalars
    assert all(scalar.dtype == "PluginArgDataType.INT32" for scalar in scalars.values())
    described = [Struct(type="HALF", format="LINEAR")] * 3
    assert plugin.get_kernel(described, described[:1]) == (kernel.entry, kernel.ptx.encode())
    print("agreed")


if __name__ == "__main__":
    main()
