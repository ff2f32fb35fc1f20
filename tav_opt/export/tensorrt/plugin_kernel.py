"""What TensorRT is told of our kernel: everything that an ahead-of-time plugin returns, computed without TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tav_opt.config import InputError
from tav_opt.kernels import aot

SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that every launch gets; whether TensorRT asks the driver for more is not documented."""


@dataclass(frozen=True, kw_only=True)
class PluginKernel:
    """A kernel as TensorRT embeds and launches it, with the arguments q, k, v, `scalars` as int32, out."""

    entry: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    """Bytes of shared memory a block."""
    scalars: tuple[int, ...]


def plugin_kernel(shape: Sequence[int], dtype: torch.dtype, frames: int, heads: int, arch: int) -> PluginKernel:
    """Sparse-causal attention of contiguous q, k, v of one `shape` (b f) n (heads width), compiled for sm_`arch`.

    Keeps within SHARED_LIMIT. Raises InputError for shapes that frames and heads do not divide, and architectures
    that the kernels are not compiled for.
    """
    rows, n, channels = shape
    if frames < 1 or rows % frames or heads < 1 or channels % heads:
        raise InputError(f"q, k, v {tuple(shape)}: {frames} frames must divide the rows, {heads} heads the channels")

    def compiled(small: bool) -> aot.Launch:
        return aot.sparse_causal(
            b=rows // frames,
            frames=frames,
            n=n,
            heads=heads,
            width=channels // heads,
            dtype=dtype,
            arch=arch,
            small=small,
        )

    launch = compiled(small=False)
    if launch.code.shared > SHARED_LIMIT:
        launch = compiled(small=True)
    assert launch.code.shared <= SHARED_LIMIT, launch.code.shared
    return PluginKernel(
        entry=launch.code.entry,
        ptx=launch.code.ptx,
        grid=launch.grid,
        block=(32 * launch.code.warps, 1, 1),
        shared=launch.code.shared,
        scalars=launch.scalars,
    )
