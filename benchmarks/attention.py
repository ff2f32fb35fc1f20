"""Sparse-causal and temporal attention against everything else one could call: `python benchmarks/attention.py`.

On a GPU: checks parity with float64 first, then times every shape of Stable Diffusion 1.5 at 512² against the peers.
Without one: a dry run on small CPU shapes, and predictions for an H200, labelled as such.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Timing, header, save, table, timed
from predict import H200, SD15, Shape, reread_bytes, seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tav_opt.kernels.naive import first_and_previous, split_heads
from tav_opt.kernels.naive import temporal_attention as transposed_temporal
from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention

Call = Callable[[], Any]
DRY = (
    Shape(b=2, frames=8, n=256, heads=4, width=16),
    Shape(b=2, frames=8, n=64, heads=4, width=32),
    Shape(b=1, frames=4, n=100, heads=2, width=40),
)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Fresh random q, k, v, (b f) n c."""
    size = (shape.b * shape.frames, shape.n, shape.heads * shape.width)
    return [torch.randn(size, device=device, dtype=dtype) for _ in range(3)]


def error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: Shape, temporal: bool, samples: int = 64) -> float:
    """The largest difference from float64 over random rows, as a share of what rounding may explain: wrong from 1 on.

    The weights and the result are rounded to the dtype once each, which is 2 × unit roundoff of the weighted |v|.
    """
    roundoff = torch.finfo(q.dtype).eps / 2
    q, k, v, out = (x.unflatten(0, (-1, shape.frames)).unflatten(-1, (shape.heads, -1)) for x in (q, k, v, out))
    worst = 0.0
    for _ in range(samples):
        clip, i, p, head = (int(torch.randint(size, ())) for size in (shape.b, shape.frames, shape.n, shape.heads))
        at = (slice(None), p) if temporal else ([0, max(i - 1, 0)], slice(None))
        keys, values = (x[clip, :, :, head][at].reshape(-1, shape.width).double() for x in (k, v))
        weights = (keys @ q[clip, i, p, head].double() / shape.width**0.5).softmax(0)
        difference = (weights @ values - out[clip, i, p, head]).abs()
        share = difference / (2 * roundoff * (weights @ values.abs()) + 1e-5)
        worst = max(worst, share.nan_to_num(torch.inf).max().item())
    return worst


def concatenated(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """What one writes without the kernel: 2n keys in memory, then a library's attention."""
    keys, values = first_and_previous(k, shape.frames), first_and_previous(v, shape.frames)
    out = F.scaled_dot_product_attention(*(split_heads(x, shape.heads) for x in (q, keys, values)))
    return out.transpose(1, 2).reshape(q.shape)


def with_backend(backend: SDPBackend, call: Call) -> Call:
    """The call with one backend of scaled_dot_product_attention."""

    def run() -> Any:
        with sdpa_kernel(backend):
            return call()

    return run


def flex(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Call:
    """FlexAttention over each clip's f·n tokens, with a block mask for frames 0 and i-1."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        frame, source = query // shape.n, key // shape.n
        return (source == 0) | (source == frame - 1)

    tokens = shape.frames * shape.n
    mask = create_block_mask(allowed, None, None, tokens, tokens, device=str(q.device))
    attend = torch.compile(flex_attention, dynamic=False)
    q, k, v = (split_heads(x.reshape(shape.b, tokens, -1), shape.heads) for x in (q, k, v))
    return lambda: attend(q, k, v, block_mask=mask).transpose(1, 2).reshape(shape.b * shape.frames, shape.n, -1)


def candidates(shape: Shape, qkv: list[Tensor]) -> dict[str, Call]:
    """Ours, then the peers; the concatenation alone is a part of every peer but FlexAttention."""
    q, k, v = qkv
    plain: Call = lambda: concatenated(q, k, v, shape)  # noqa: E731
    calls: dict[str, Call] = {"ours": lambda: sparse_causal_attention(q, k, v, shape.frames, shape.heads)}
    if not q.is_cuda:
        return calls | {"concatenation + SDPA": plain}
    calls |= {f"concatenation + SDPA, {name}": with_backend(backend, plain) for name, backend in BACKENDS.items()}
    return calls | {"FlexAttention": lambda: flex(q, k, v, shape)}


def measure(name: str, call: Call, calls: int) -> Timing:
    """On a GPU by events around each call; on a CPU by the wall clock."""
    if not torch.cuda.is_available():
        return timed(name, call, calls=calls)
    import triton

    median, p10, p90 = triton.testing.do_bench(call, warmup=25, rep=100, quantiles=[0.5, 0.1, 0.9])
    return Timing(name, median / 1e3, p10 / 1e3, p90 / 1e3, calls=0)


def one_shape(shape: Shape, device: str, dtype: torch.dtype, calls: int) -> tuple[list[Timing], dict[str, Any]]:
    """Checks, then times, every candidate; one that fails is named with its reason and not timed."""
    q, k, v = inputs(shape, device, dtype)
    timings, quality = [], {}
    for name, call in candidates(shape, [q, k, v]).items():
        try:
            ready = call() if name == "FlexAttention" else call
            difference = error(ready(), q, k, v, shape, temporal=False)
        except Exception as refused:  # a backend says in its own way that it does not take a shape
            if name == "ours":
                raise
            quality[name] = f"not available: {str(refused).splitlines()[0][:100]}"
            continue
        quality[name] = difference
        if difference >= 1:
            print(f"{name} is wrong by {difference:.2g} × rounding: not timed", file=sys.stderr)
            if name == "ours":
                raise SystemExit(1)
            continue
        timings.append(measure(name, ready, calls))
    both: Call = lambda: (first_and_previous(k, shape.frames), first_and_previous(v, shape.frames))  # noqa: E731
    timings.append(measure("concatenation alone", both, calls))
    return timings + temporal(shape, [q, k, v], calls, quality), quality


def temporal(shape: Shape, qkv: list[Tensor], calls: int, quality: dict[str, Any]) -> list[Timing]:
    """Attention over frames, in place and by transposition."""
    timings = []
    for name, attend in (("temporal, ours", temporal_attention), ("temporal, transposed + SDPA", transposed_temporal)):
        call: Call = lambda attend=attend: attend(*qkv, shape.frames, shape.heads)  # type: ignore[misc]  # noqa: E731
        quality[name] = error(call(), *qkv, shape, temporal=True)
        if quality[name] >= 1:
            raise SystemExit(f"{name} is wrong by {quality[name]:.2g} × rounding: not timed")
        timings.append(measure(name, call, calls))
    return timings


def limits() -> dict[str, float]:
    """What this card reaches a second: flops of a large fp16 product, bytes of a copy, exponentials."""
    from exponentials import rate

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    large = torch.randn(1 << 30, device="cuda", dtype=torch.float16)
    into = torch.empty_like(large)
    return {
        "matrix": 2 * 8192**3 / measure("", lambda: a @ b, 0).median,
        "memory": 2 * large.nbytes / measure("", lambda: into.copy_(large), 0).median,
        "exponentials": rate(),
    }


def describe(shape: Shape, timings: list[Timing], reached: dict[str, float]) -> str:
    """The rate of ours by 4 × width × pairs, its share of the binding limit, and the gain over the fastest peer."""
    by_name = {t.stage: t.median for t in timings}
    ours = by_name["ours"]
    needs = {
        "matrix": shape.flops / reached["matrix"],
        "exponentials": shape.scores / reached["exponentials"],
        "memory": shape.bytes() / reached["memory"],
    }
    binding = max(needs, key=lambda unit: needs[unit])
    peers = [s for name, s in by_name.items() if "SDPA," in name or name == "FlexAttention"]
    gain = f", {min(peers) / ours:.2f}× the fastest peer" if peers else ""
    rate = f"{shape.flops / ours / 1e12:.1f} TFLOP/s, {shape.bytes() / 1e6:.0f} MB moved"
    return f"{rate}, {needs[binding] / ours:.0%} of the limit ({binding}){gain}"


def predictions() -> tuple[str, dict[str, Any]]:
    """A table in microseconds for an H200; not a measurement."""
    rows = [
        f"### Predicted for one {H200.name}, NOT measured: published rates, sm_{H200.arch} code, fp16, microseconds",
        "",
        "| f | n | width | matrix | exponentials | issue | memory | floor | sum | GB of keys and values from L2 |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    values: dict[str, Any] = {}
    for shape in SD15:
        units = seconds(shape)
        values[title(shape)] = units
        cells = [*units.values(), max(units.values()), sum(units.values())]
        rows.append(
            f"| {shape.frames} | {shape.n} | {shape.width} | "
            + " | ".join(f"{s * 1e6:.0f}" for s in cells)
            + f" | {reread_bytes(shape) / 1e9:.1f} |"
        )
    return "\n".join(rows), values


def title(shape: Shape) -> str:
    """A shape in words."""
    return f"b {shape.b}, f {shape.frames}, n {shape.n}, {shape.heads} heads of {shape.width}"


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON; default benchmarks/results/attention-<device>.json"
    )
    parser.add_argument("--calls", type=int, default=10, help="timed calls on a CPU")
    chosen = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype, shapes = ("cuda", torch.float16, SD15) if gpu else ("cpu", torch.float32, DRY)
    torch.manual_seed(0)
    print(header("attention" if gpu else "attention, dry run on a CPU: the naive twin, no kernel"))
    reached = limits() if gpu else {}
    results, quality = {}, {}
    for shape in shapes:
        name = title(shape)
        results[name], quality[name] = one_shape(shape, device, dtype, chosen.calls)
        print(f"\n{table(name, results[name])}\n\nlargest error as a share of rounding: {quality[name]}")
        if gpu:
            print(describe(shape, results[name], reached))
    text, predicted = predictions()
    print(f"\n{text}")
    out = chosen.out or Path(f"benchmarks/results/attention-{device}.json")
    what = {"what": "attention", "device": device, "limits": reached, "predicted_not_measured": predicted}
    save(out, what, results, quality)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
