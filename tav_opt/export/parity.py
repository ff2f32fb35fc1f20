"""Every exported graph and engine against eager PyTorch, before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tav_opt.engines.onnxruntime import session
from tav_opt.export import layers
from tav_opt.export.graphs import Graph
from tav_opt.repository.specs import GraphSpec, TensorSpec

_SEED = 33
_ROWS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest error allowed, as a part of the largest value (of 1 where that is smaller), and why."""

    error: float
    reason: str


TOLERANCES = {
    "text_encoder": Tolerance(error=2e-5, reason="float32 sums in another order, over the layers of a transformer"),
    "vae_encoder": Tolerance(error=5e-5, reason="float32 sums in another order, over a deep convolutional network"),
    "unet": Tolerance(
        error=1e-3,
        reason="float32 sums in another order, which a tuned network amplifies here and there: 2e-4 seen, mean 1e-6",
    ),
    "vae_decoder": Tolerance(error=1e-4, reason="a hundredth of a grey level; a frame has 255"),
}
"""Of float32."""

HALF_TOLERANCES = {
    "text_encoder": Tolerance(error=5e-3, reason="fp16 rounds by 5e-4, over the layers of a transformer"),
    "vae_encoder": Tolerance(error=5e-3, reason="fp16 rounds by 5e-4, over a deep convolutional network"),
    "unet": Tolerance(error=1e-2, reason="fp16 rounds by 5e-4, over the deepest of the networks, and its skips add"),
    "vae_decoder": Tolerance(error=1e-2, reason="about one grey level of 255"),
}
"""Of fp16 with fp32 islands: 4 to 19 times what was measured on small models and SD 1.5's random weights, as trained
ones are larger (text encoder 1.4e-3, VAE encoder 2.6e-4, UNet 1.8e-3, VAE decoder 2.2e-3)."""


def tolerance_of(graph: Graph, *, half: bool) -> Tolerance:
    """What a graph must reach; a variant of one of the base's own, what that must."""
    return (HALF_TOLERANCES if half else TOLERANCES)[graph.kind or graph.name]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a graph is from eager PyTorch."""

    error: float
    tolerance: Tolerance

    def to_json(self) -> dict[str, Any]:
        return {"error": self.error, "tolerance": self.tolerance.error, "reason": self.tolerance.reason}


OnGraph = Callable[[str, Parity], object]
"""Called with the name of each graph that was made, and how far it is from eager PyTorch."""


class ParityError(Exception):
    """An exported graph, or a whole edit, departs from eager PyTorch by more than is allowed; nothing was written."""


def _inputs(graph: Graph, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    def random(spec: TensorSpec) -> Tensor:
        if spec.dtype == "int64":
            return torch.randint(graph.below, spec.fixed(rows), generator=generator)
        return torch.randn(spec.fixed(rows), generator=generator)

    return {spec.name: random(spec) for spec in graph.spec.inputs}


def _values(graph: Graph, generator: torch.Generator) -> dict[str, Tensor]:
    """Another clip's values: fresh noise on each, so that a value at the wrong input shows."""
    return {name: v + 0.02 * torch.randn(v.shape, generator=generator) for name, v in graph.values.items()}


Run = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]
"""A graph in some runtime: inputs by name, a clip's values by parameter → the outputs by name."""


def in_onnxruntime(path: Path, spec: GraphSpec) -> Run:
    """A graph's file in onnxruntime on the processor."""
    run = session(path, torch.device("cpu")).run
    names = [output.name for output in spec.outputs]

    def call(inputs: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
        named = inputs | {spec.values[name].name: value for name, value in values.items()}
        return spec.by_name([torch.from_numpy(x) for x in run(names, {name: x.numpy() for name, x in named.items()})])

    return call


@torch.no_grad()
def measure(graph: Graph, run: Run, *, half: bool = False) -> Parity:
    """Runs the graph in a runtime, `half` in fp16, and the fp32 module on the same seeded inputs, at three lengths."""
    generator = torch.Generator().manual_seed(_SEED)
    values = _values(graph, generator)
    errors = []
    for rows in _ROWS:
        inputs = _inputs(graph, rows, generator)
        found = run(inputs, values)
        for name, eager in graph.run(inputs, values).items():
            errors.append(float((found[name] - eager).abs().max() / eager.abs().max().clamp(min=1)))
    return Parity(error=float(np.max(errors)), tolerance=tolerance_of(graph, half=half))


def check(graph: Graph, run: Run, *, half: bool = False) -> Parity:
    """The parity of a graph; raises ParityError, naming the error and the tolerance, when it is not met."""
    parity = measure(graph, run, half=half)
    if not parity.error <= parity.tolerance.error:  # NaN fails too
        raise ParityError(
            f"{graph.name}: error {parity.error:.1e} against eager PyTorch is over its tolerance "
            f"{parity.tolerance.error:.0e} ({parity.tolerance.reason}): nothing was written"
        )
    return parity


@torch.no_grad()
def feeds(graph: Graph, rows: int, *, count: int = 2, own: bool = False) -> list[dict[str, np.ndarray]]:
    """Seeded inputs for the fp16 graph by name, a clip's values among them in fp16, as clips are kept.

    The values are another clip's than the graph was traced with, unless its `own` are asked for.
    """
    generator = torch.Generator().manual_seed(_SEED)
    chosen = graph.values if own else _values(graph, generator)
    values = {graph.spec.values[name].name: value.half() for name, value in chosen.items()}
    return [
        {name: value.numpy() for name, value in (_inputs(graph, rows, generator) | values).items()}
        for _ in range(count)
    ]


@torch.no_grad()
def eager(graph: Graph, feed: layers.Feed) -> dict[str, np.ndarray]:
    """The module's float32 answer to a feed."""
    inputs = {spec.name: torch.from_numpy(feed[spec.name]) for spec in graph.spec.inputs}
    values = {name: torch.from_numpy(feed[spec.name]).float() for name, spec in graph.spec.values.items()}
    return {name: output.numpy() for name, output in graph.run(inputs, values).items()}


def measure_half(graph: Graph, runners: Sequence[layers.Runner], fed: Sequence[layers.Feed]) -> dict[str, Parity]:
    """The fp16 graph as each of Polygraphy's runners has it, against eager PyTorch, by the runner's name."""
    reference = layers.eager_runner(lambda feed: eager(graph, feed), fed[0])
    return {
        name: Parity(error=max(d.error for d in differences), tolerance=tolerance_of(graph, half=True))
        for name, differences in layers.compare([reference, *runners], fed).items()
    }


def check_half(name: str, found: dict[str, Parity]) -> None:
    """Raises ParityError, naming the runtime, the error and the tolerance, where one is not met."""
    for runtime, parity in found.items():
        if not parity.error <= parity.tolerance.error:
            raise ParityError(
                f"{name}: error {parity.error:.1e} in {runtime} against eager PyTorch is over its tolerance "
                f"{parity.tolerance.error:.0e} ({parity.tolerance.reason}): no engine was written"
            )


def first_departure(differences: Sequence[layers.Difference], tolerance: float) -> str:
    """One line that names the first layer over the tolerance, or the worst where none is."""
    over = next((d for d in differences if not d.error <= tolerance), None)
    if over is not None:
        return f"{over.tensor} is the first layer that departs: error {over.error:.1e} of {over.largest:.1e}"
    worst = max(differences, key=lambda d: d.error)
    return f"no layer departs by more than {tolerance:.0e}; the worst is {worst.tensor}: {worst.error:.1e}"
