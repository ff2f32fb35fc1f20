"""What the graphs of a base take and give: declared where they are exported, listed in the base's manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tav_opt.config import InputError
from tav_opt.files import refuse_pointer
from tav_opt.repository.layout import manifest

T = TypeVar("T")
_PLAIN = ("latents", "timestep", "text")
"""What every UNet takes."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output, by name."""

    name: str
    shape: tuple[int | str, ...]
    """A text is a free axis: the same name, the same length."""
    dtype: str
    """As NumPy names it."""

    @property
    def free(self) -> dict[int, str]:
        """The free axes by their number."""
        return {number: axis for number, axis in enumerate(self.shape) if isinstance(axis, str)}

    def fixed(self, length: int) -> tuple[int, ...]:
        """The shape, free axes so long."""
        return tuple(length if isinstance(axis, str) else axis for axis in self.shape)


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One graph of a base."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    values: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Further inputs by the parameter of the clip that they stand for."""

    @property
    def is_unet(self) -> bool:
        """Whether it is one of the base's UNet, which alone predicts noise (or v)."""
        return self.outputs[0].name == "noise"

    @property
    def gives_features(self) -> bool:
        """Whether it is a UNet that gives the features of its outermost layers, too."""
        return self.is_unet and len(self.outputs) > 1

    @property
    def further(self) -> tuple[str, ...]:
        """What a UNet takes beside latents, timestep and text, by the names of `unet.arguments`."""
        return tuple(one.name for one in self.inputs if one.name not in _PLAIN)

    @property
    def file(self) -> str:
        """Of the graph in ONNX; its weights lie beside it."""
        return f"{self.name}.onnx"

    def by_name(self, outputs: T | Sequence[T]) -> dict[str, T]:
        """The outputs as a runtime gives them, the only one perhaps alone, by their names."""
        found = outputs if isinstance(outputs, list | tuple) else [outputs]
        return {spec.name: output for spec, output in zip(self.outputs, found, strict=True)}


def read(base: Path) -> dict[str, GraphSpec]:
    """The graphs of an exported base's own, by name."""
    from tav_opt.schemas import BaseManifest

    told = manifest(base, BaseManifest)
    if "graphs" in told:
        return {found["name"]: _graph(found) for found in told["graphs"]}
    names = ("text_encoder", "vae_encoder", "unet", "vae_decoder")  # exported before they were listed
    return {name: of_onnx(base / f"{name}.onnx", told.get("values", {})) for name in names}


def added(base: Path) -> dict[str, GraphSpec]:
    """The graphs that were added to an exported base after its own, by name."""
    from tav_opt.schemas import BaseManifest

    return {name: _graph(found["graph"]) for name, found in manifest(base, BaseManifest).get("added", {}).items()}


def value_inputs(base: Path) -> dict[str, str]:
    """The inputs for a clip's own values, of whichever graph, by parameter."""
    return {parameter: value.name for spec in read(base).values() for parameter, value in spec.values.items()}


def check_values(base: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises InputError where a clip's own values, their shapes by parameter, are not those that a base takes."""
    taken = {parameter: value.shape for spec in read(base).values() for parameter, value in spec.values.items()}
    if different := sorted(set(taken) ^ set(shapes)):
        raise InputError(
            f"{base.name} takes other values than the clip tuned, {different[0]} for one: choose another --repository"
        )
    for name, shape in taken.items():
        if tuple(shapes[name]) != shape:
            raise InputError(f"value {name} is {tuple(shapes[name])}, but {base.name} takes {shape}")


def of_onnx(path: Path, values: Mapping[str, str]) -> GraphSpec:
    """What an ONNX file says that it takes and gives; `values` are names of inputs by parameter."""
    import onnx

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        kind = value.type.tensor_type
        shape = tuple(axis.dim_param or axis.dim_value for axis in kind.shape.dim)
        return TensorSpec(name=value.name, shape=shape, dtype=str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))

    refuse_pointer(path)  # and what would block, or is not there
    graph = onnx.load(path, load_external_data=False).graph
    inputs = {value.name: spec(value) for value in graph.input}
    own = {parameter: inputs.pop(name) for parameter, name in values.items() if name in inputs}
    return GraphSpec(
        name=path.stem, inputs=tuple(inputs.values()), outputs=tuple(spec(value) for value in graph.output), values=own
    )


def _graph(found: Mapping[str, Any]) -> GraphSpec:
    return GraphSpec(
        name=found["name"],
        inputs=tuple(map(_tensor, found["inputs"])),
        outputs=tuple(map(_tensor, found["outputs"])),
        values={parameter: _tensor(value) for parameter, value in found["values"].items()},
    )


def _tensor(found: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name=found["name"], shape=tuple(found["shape"]), dtype=found["dtype"])
