"""`tav_opt::SparseCausalAttention` as an ahead-of-time Python plugin of TensorRT: the thin layer on `tensorrt.plugin`.

Needed while an engine is built, never when it runs: the engine holds the PTX. This file was checked against the
signatures of TensorRT 11.4's Python bindings, and has not run inside TensorRT.
"""

# No `from __future__ import annotations`: TensorRT reads the annotations as types. Imported only where TensorRT is.

from typing import Any

import tensorrt as trt
import tensorrt.plugin as trtp
import torch

from tav_opt.export import sparse_causal
from tav_opt.export.tensorrt.plugin_kernel import plugin_kernel

PLUGIN = f"{sparse_causal.DOMAIN}::{sparse_causal.NAME}"
_DTYPES = {trt.float16: torch.float16, trt.float32: torch.float32, trt.bfloat16: torch.bfloat16}
_architecture: list[int] = []
"""The one that kernels are compiled for, as `for_architecture` was told."""


def for_architecture(arch: int) -> None:
    """Says which GPU the engines built from now on are for (90 = sm_90)."""
    _architecture[:] = [arch]


@trtp.register(PLUGIN)
def describe(q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc, frames: int, heads: int) -> trtp.TensorDesc:
    """The output is as q is."""
    return q.like()


@trtp.aot_impl(PLUGIN)
def compiled(
    q: trtp.TensorDesc,
    k: trtp.TensorDesc,
    v: trtp.TensorDesc,
    frames: int,
    heads: int,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    """The kernel for these static shapes."""
    kernel = plugin_kernel(tuple(q.shape), _DTYPES[q.dtype], frames, heads, *_architecture)
    launch: Any = trtp.KernelLaunchParams(*kernel.grid, *kernel.block, kernel.shared)
    scalars = trtp.SymIntExprs(len(kernel.scalars))
    for position, value in enumerate(kernel.scalars):
        scalars[position] = trtp.SymInt32(value)
    return kernel.entry, kernel.ptx, launch, scalars
