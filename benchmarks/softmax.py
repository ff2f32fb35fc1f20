"""Attention over as many keys as 512² has, its softmax in fp32 and in fp16: `python benchmarks/softmax.py --help`.

Scores, weights and output are fp16 every time, as in the graph; products with the values are summed in fp32.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from common import header, machine
from torch import Tensor

from tav_opt import command
from tav_opt.files import write_json


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Error of attention's output over its largest value, by how far scores spread and how the softmax is computed."""

    keys: int = 8192
    """Of two frames of 64 × 64 latents."""
    queries: int = 64
    width: int = 40
    spreads: tuple[float, ...] = (0, 0.5, 1, 4, 10)
    """Standard deviations of the scores."""
    out: Path = Path("benchmarks/results/softmax.json")


def half(x: Tensor) -> Tensor:
    """Rounded to fp16."""
    return x.half().float()


def in_pairs(x: Tensor) -> Tensor:
    """Sums of the rows in fp16: neighbours, then neighbours of those."""
    while x.shape[-1] > 1:
        x = half(x[..., 0::2] + x[..., 1::2])
    return x


def one_by_one(x: Tensor) -> Tensor:
    """Sums of the rows in fp16, one term after the other."""
    sums = np.cumsum(x.half().numpy(), axis=-1, dtype=np.float16)[..., -1:]
    return torch.from_numpy(sums).float()


def weights(scores: Tensor) -> dict[str, Tensor]:
    """The softmax of fp16 scores as the island computes it, and step by step in fp16 with its sum in several ways."""
    powers = half(torch.exp(half(scores - scores.amax(-1, keepdim=True))))
    return {
        "fp32": torch.softmax(scores, -1),
        "fp16, sum in fp32": powers / half(powers.sum(-1, keepdim=True)),
        "fp16, sum in fp16 by pairs": powers / in_pairs(powers),
        "fp16, sum in fp16 one by one": powers / one_by_one(powers),
    }


def main(config: Softmax) -> int:
    """Measures and prints; returns 0."""
    torch.manual_seed(0)
    values = half(torch.randn(config.keys, config.width))
    rows: dict[str, list[float]] = {}
    for spread in config.spreads:
        scores = half(spread * torch.randn(config.queries, config.keys))
        exact = torch.softmax(scores.double(), -1) @ values.double()
        for name, found in weights(scores).items():
            error = (half(half(found) @ values) - exact).abs().max() / exact.abs().max()
            rows.setdefault(name, []).append(float(error))
    print(header(f"attention over {config.keys} keys of width {config.width}"))
    print("\n| softmax |" + "".join(f" spread {spread:g} |" for spread in config.spreads))
    print("|---|" + "---:|" * len(config.spreads))
    for name, errors in rows.items():
        print(f"| {name} |" + "".join(f" {error:.1e} |" for error in errors))
    what = {"keys": config.keys, "width": config.width, "spreads": config.spreads}
    write_json(config.out, {"what": what, "machine": machine(), "errors": rows})
    return 0


if __name__ == "__main__":
    sys.exit(
        command.run(
            "benchmarks/softmax.py",
            lambda arguments: main(tyro.cli(Softmax, prog="benchmarks/softmax.py", args=arguments)),
        )
    )
