"""A graph's module in half precision, its convolutions in the layout that GPUs compute them in: what is compiled there.

What `export/half.py` makes islands of is fp32 here by the operators' own definition: norms have fp32 statistics,
attention an fp32 softmax (PyTorch's and ours), and diffusers computes the timestep's sinusoid in fp32.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch

from tav_opt.export.graphs import Graph
from tav_opt.repository.specs import TensorSpec


def in_half(graph: Graph, device: torch.device) -> Graph:
    """The same graph on a device, all that has a fraction in fp16: inputs, a clip's values, outputs."""
    module = deepcopy(graph.module).to(device, torch.float16)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which its types forget
    values = {name: value.to(device, torch.float16) for name, value in graph.values.items()}
    spec = replace(
        graph.spec,
        inputs=tuple(map(_narrowed, graph.spec.inputs)),
        outputs=tuple(map(_narrowed, graph.spec.outputs)),
        values={name: _narrowed(value) for name, value in graph.spec.values.items()},
    )
    return replace(graph, spec=spec, module=module, values=values)


def _narrowed(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="float16") if spec.dtype == "float32" else spec
