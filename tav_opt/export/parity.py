"""Every exported graph and engine against eager PyTorch, before it gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tav_opt.engines.onnxruntime import session
from tav_opt.export import layers
from tav_opt.export.graphs import Graph, input_name

_SEED = 33
_ROWS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest error allowed, as a part of the largest value (of 1 where that is smaller), and why."""

    error: float
    reason: str


TOLERANCES = {
    "text_encoder": Tolerance(error=2e-5, reason="float32 sums in another order, over the layers of a transformer"),
    "vae_encoder": Tolerance(error=5e-5, reason="float32 sums in another order, over a deep convolutional network"),
    "unet": Tolerance(
        error=1e-4, reason="float32 sums in another order, over the deepest of the networks; 2e-6 at SD 1.5's size"
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


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a graph is from eager PyTorch."""

    error: float
    tolerance: Tolerance

    def to_json(self) -> dict[str, Any]:
        return {"error": self.error, "tolerance": self.tolerance.error, "reason": self.tolerance.reason}


class ParityError(Exception):
    """An exported graph departs from eager PyTorch by more than its tolerance; nothing was written."""


def _inputs(graph: Graph, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    def random(like: Tensor) -> Tensor:
        shape = (rows, *like.shape[1:])
        if like.dtype == torch.int64:
            return torch.randint(graph.below, shape, generator=generator)
        return torch.randn(shape, generator=generator)

    return {name: random(like) for name, like in graph.inputs.items()}


def _values(graph: Graph, generator: torch.Generator) -> dict[str, Tensor]:
    """Another clip's values: fresh noise on each, so that a value at the wrong input shows."""
    return {name: v + 0.02 * torch.randn(v.shape, generator=generator) for name, v in (graph.values or {}).items()}


@torch.no_grad()
def measure(graph: Graph, path: Path) -> Parity:
    """Runs the file in onnxruntime and the module in PyTorch on the same seeded inputs, at several lengths."""
    run = session(path, torch.device("cpu")).run
    generator = torch.Generator().manual_seed(_SEED)
    values = _values(graph, generator)
    errors = []
    for rows in _ROWS:
        inputs = _inputs(graph, rows, generator)
        eager = graph.module(*inputs.values(), **({"values": values} if graph.values else {}))
        named = inputs | {input_name(name): value for name, value in values.items()}
        (output,) = run(None, {name: value.numpy() for name, value in named.items()})
        difference = (torch.from_numpy(output) - eager).abs().max()
        errors.append(float(difference / eager.abs().max().clamp(min=1)))
    return Parity(error=float(np.max(errors)), tolerance=TOLERANCES[graph.name])


def check(graph: Graph, path: Path) -> Parity:
    """The parity of a file; raises ParityError, naming the error and the tolerance, when it is not met."""
    parity = measure(graph, path)
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
    chosen = (graph.values or {}) if own else _values(graph, generator)
    values = {input_name(name): value.half() for name, value in chosen.items()}
    return [
        {name: value.numpy() for name, value in (_inputs(graph, rows, generator) | values).items()}
        for _ in range(count)
    ]


def eager(graph: Graph, feed: layers.Feed) -> np.ndarray:
    """The module's float32 answer to a feed."""
    inputs = [torch.from_numpy(feed[name]) for name in graph.inputs]
    values = {name: torch.from_numpy(feed[input_name(name)]).float() for name in graph.values or {}}
    with torch.no_grad():
        return graph.module(*inputs, **({"values": values} if values else {})).numpy()


def measure_half(graph: Graph, runners: Sequence[layers.Runner], fed: Sequence[layers.Feed]) -> dict[str, Parity]:
    """The fp16 graph as each of Polygraphy's runners has it, against eager PyTorch, by the runner's name."""
    reference = layers.eager_runner(lambda feed: eager(graph, feed), fed[0], graph.output)
    return {
        name: Parity(error=max(d.error for d in differences), tolerance=HALF_TOLERANCES[graph.name])
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
