"""Predicted times of the sparse-causal kernel on one card: `python benchmarks/predict.py`.

They follow from counted operations, bytes and compiled instructions. Nothing here is a measurement. The limits are the
vendor's published rates, not what a card was seen to reach.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch

from tav_opt.kernels.inputs import split_width
from tav_opt.kernels.tiles import sparse_causal_tile


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention of the UNet: b clips of f frames of n tokens, heads of `width` values."""

    b: int
    frames: int
    n: int
    heads: int
    width: int

    @property
    def scores(self) -> int:
        """Query-key pairs: frames 0 and 1 read frame 0 alone, every other frame two frames."""
        sources = 2 * self.frames - 2 if self.frames > 1 else 1
        return self.b * self.heads * self.n**2 * sources

    @property
    def flops(self) -> int:
        """Of both products, on the head's own width: 2 × 2 × width a pair."""
        return 4 * self.width * self.scores

    def bytes(self, itemsize: int = 2) -> int:
        """q, k, v read once and the result written once."""
        return 4 * self.b * self.frames * self.n * self.heads * self.width * itemsize


# Stable Diffusion 1.5 at 512², both prompts of guidance, by the reference's clip length and a longer one.
SD15 = tuple(
    Shape(b=2, frames=frames, n=n, heads=8, width=width)
    for frames in (24, 32)
    for n, width in ((4096, 40), (1024, 80), (256, 160), (64, 160))
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Published rates: a clock in Hz, and per multiprocessor and clock exponentials and warp instructions issued."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    matrix: float  # flops a second, fp16 dense with fp32 accumulation
    memory: float  # bytes a second
    exponentials: int = 16
    issued: int = 4


H200 = Card(name="H200", arch=90, multiprocessors=132, clock=1.83e9, matrix=989e12, memory=4.8e12)


def loop_instructions(sass: str) -> list[str]:
    """Names of the instructions of the innermost loop around the matrix products."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\S.*?)\s*;", sass)]
    loops = []
    for address, text in code:
        if text.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", text)):
            start = int(target[1], 16)
            body = [t.split()[0] for a, t in code if start <= a <= address]
            if start < address and any("MMA" in name for name in body):
                loops.append(body)
    assert loops, "no loop around a matrix product"
    return min(loops, key=len)


def disassemble(cubin: bytes) -> str:
    """The machine code, by the disassembler that ships with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def reread_bytes(shape: Shape, card: Card = H200) -> float:
    """Keys and values that the tiles of queries load in fp16; L2 holds them, and publishes no rate to predict with."""
    tile = sparse_causal_tile(card.arch, shape.n, shape.width, 2)
    return shape.scores / tile.queries * 2 * shape.width * 2


def seconds(shape: Shape, card: Card = H200) -> dict[str, float]:
    """Seconds that each unit needs for one call in fp16; the slowest alone is a floor, their sum has no overlap."""
    from tav_opt.kernels import aot

    tile = sparse_causal_tile(card.arch, shape.n, shape.width, 2)
    sizes = {"b": shape.b, "frames": shape.frames, "n": shape.n, "heads": shape.heads, "width": shape.width}
    launch = aot.sparse_causal(**sizes, dtype=torch.float16, arch=card.arch)
    loop = loop_instructions(disassemble(launch.code.cubin))
    passes = shape.scores / (tile.queries * tile.keys) * tile.warps  # of the loop, by one warp
    clocks = card.multiprocessors * card.clock
    head, rest = split_width(shape.width)
    return {
        "matrix": shape.flops / shape.width * (head + rest) / card.matrix,
        "exponentials": passes * 32 * sum(name.startswith("MUFU") for name in loop) / (card.exponentials * clocks),
        "issue": passes * len(loop) / (card.issued * clocks),
        "memory": shape.bytes() / card.memory,
    }


def main() -> None:
    """Prints the table in microseconds for an H200; not a measurement."""
    print(
        f"### Predicted for one {H200.name}, NOT measured: published rates, sm_{H200.arch} code, fp16, microseconds\n"
    )
    print("| f | n | width | matrix | exponentials | issue | memory | floor | sum | GB of keys and values from L2 |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for shape in SD15:
        units = seconds(shape)
        cells = [*units.values(), max(units.values()), sum(units.values())]
        times = " | ".join(f"{second * 1e6:.0f}" for second in cells)
        print(f"| {shape.frames} | {shape.n} | {shape.width} | {times} | {reread_bytes(shape) / 1e9:.1f} |")


if __name__ == "__main__":
    main()
