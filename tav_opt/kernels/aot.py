"""The kernels ahead of time: PTX and how to launch it, compiled without a GPU, in the form that TensorRT embeds."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tav_opt.config import InputError
from tav_opt.kernels import sparse_causal_kernel, temporal_kernel
from tav_opt.kernels.tiles import sparse_causal_tile

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
PTX_VERSION = 87  # 8.7, the oldest that knows all of them: drivers from 570 (CUDA 12.8) on take it
_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
_ALIGNMENT = 16  # bytes of a pointer, or the divisor of an integer, that vectorised loads ask for


@dataclass(frozen=True, kw_only=True)
class Ptx:
    """One compiled kernel: `shared` bytes of shared memory and 32 `warps` threads a program, registers a thread."""

    ptx: str
    entry: str
    warps: int
    shared: int
    registers: int
    spills: int  # bytes of stack a thread
    cubin: bytes  # of the same code before its hidden parameters were cut: for reading its instructions


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A compiled kernel, its grid, and the int32 scalars that stand between the pointers q, k, v and out."""

    code: Ptx
    grid: tuple[int, int, int]
    scalars: tuple[int, ...]


def compile_ptx(
    kernel: Any, signature: Mapping[str, str], constexprs: Mapping[str, Any], arch: int, *, warps: int, stages: int
) -> Ptx:
    """Compiles a kernel for sm_`arch` without a GPU.

    `signature` gives every other argument's type ("*fp16", "i32"), with ":16" where it is a multiple of 16. Triton's
    own cache keeps the result by content: the kernel's source, constants, options and version.
    """
    if arch not in ARCHITECTURES:
        raise InputError(f"sm_{arch}: the kernels are compiled for {', '.join(f'sm_{a}' for a in ARCHITECTURES)}")
    if knobs.runtime.interpret:
        raise InputError("TRITON_INTERPRET=1: an interpreted kernel cannot be compiled; unset it")
    names = kernel.arg_names
    types = {name: "constexpr" if name in constexprs else signature[name].split(":")[0] for name in names}
    aligned = {
        (i,): [["tt.divisibility", _ALIGNMENT]]
        for i, name in enumerate(names)
        if signature.get(name, "").endswith(f":{_ALIGNMENT}")
    }
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constexprs.items()}, aligned)
    options = {"num_warps": warps, "num_stages": stages, "ptx_version": PTX_VERSION, "enable_fp_fusion": True}
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # it would carry this machine's paths into engines
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    meta = compiled.metadata
    assert meta.global_scratch_size == meta.profile_scratch_size == 0, "the kernel uses scratch that TensorRT lacks"
    registers, spills = _resources(compiled.asm["cubin"])
    return Ptx(
        ptx=_cut_scratch(compiled.asm["ptx"], meta.name),
        entry=meta.name,
        warps=meta.num_warps,
        shared=meta.shared,
        registers=registers,
        spills=spills,
        cubin=compiled.asm["cubin"],
    )


def _cut_scratch(ptx: str, entry: str) -> str:
    """Cuts the last two parameters, the pointers to scratch memory that Triton's own launcher passes."""
    head, body = ptx.split(f".entry {entry}(", 1)
    declared, body = body.split(")", 1)
    parameters = [line.rstrip(",") for line in declared.strip().splitlines()]
    *kept, scratch, profile = parameters
    assert all(parameter.split()[-1] not in body for parameter in (scratch, profile)), "scratch parameters are read"
    return f"{head}.entry {entry}(\n" + ",\n".join(kept) + f"\n){body}"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, as cuobjdump reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def _signature(dtype: torch.dtype, scalars: Mapping[str, int]) -> dict[str, str]:
    pointers = dict.fromkeys(("q", "k", "v", "out"), f"{_TYPES[dtype]}:{_ALIGNMENT}")
    return pointers | {name: "i32" if value % _ALIGNMENT else f"i32:{_ALIGNMENT}" for name, value in scalars.items()}


def _strides(n: int, c: int) -> dict[str, int]:
    """Of contiguous q, k, v, as TensorRT gives them."""
    return {f"{x}_{step}": size for x in "qkv" for step, size in (("frame", n * c), ("token", c))}


def sparse_causal(
    *, b: int, frames: int, n: int, heads: int, width: int, dtype: torch.dtype, arch: int, small: bool = False
) -> Launch:
    """Sparse-causal attention of contiguous q, k, v (b f) n (heads width); `small` keeps within 48 KB."""
    tile = sparse_causal_tile(arch, n, width, dtype.itemsize, small)
    scalars = {"frames": frames, "n": n} | _strides(n, heads * width)
    code = compile_ptx(
        sparse_causal_kernel.sparse_causal_kernel,
        _signature(dtype, scalars),
        sparse_causal_kernel.constants(width, n, tile) | {"lse": None},
        arch,
        warps=tile.warps,
        stages=tile.stages,
    )
    return Launch(code=code, grid=(triton.cdiv(n, tile.queries), heads, b * frames), scalars=tuple(scalars.values()))


def temporal(*, b: int, frames: int, n: int, heads: int, width: int, dtype: torch.dtype, arch: int) -> Launch:
    """Temporal attention of contiguous q, k, v (b f) n (heads width)."""
    scalars = {"n": n} | _strides(n, heads * width)
    code = compile_ptx(
        temporal_kernel.temporal_kernel,
        _signature(dtype, scalars),
        temporal_kernel.constants(width, frames, dtype.itemsize),
        arch,
        warps=temporal_kernel.warps(frames, width),
        stages=1,
    )
    return Launch(
        code=code, grid=temporal_kernel.grid(b, frames, n, heads, dtype.itemsize), scalars=tuple(scalars.values())
    )
