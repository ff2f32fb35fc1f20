"""Group norms over clips with SiLU inside, against PyTorch's on transposed copies, at Stable Diffusion 1.5's shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import sd15
import torch
from attention import measure, milliseconds
from report import Report
from torch import Tensor

from tav_opt.config import first_line
from tav_opt.kernels import naive
from tav_opt.kernels.group_norm import group_norm
from tav_opt.unet import VideoResnetBlock, inflate

CLIPS, FRAMES, GROUPS, EPS = 2, 24, 32, 1e-5
FORWARD, BACKWARD = 1.0, 3.0
"""The roundings of a half that a result's error may be worth, in root mean squares: its own; and its factors'."""


class Shape(NamedTuple):
    """Of a norm's input: channels and one side."""

    c: int
    side: int


def norms(report: Report) -> None:
    """Each shape right, then timed; then all norms with SiLU of a guided step together."""
    frames = 3 if report.dry else FRAMES
    total = {"ours": 0.0, "PyTorch's": 0.0}
    for shape, count in sorted(shapes(small=report.dry).items(), reverse=True):
        times = _one_shape(report, shape, count, frames)
        total = {name: total[name] + count * times.get(name, torch.nan) for name in total}
    gain = total["PyTorch's"] / total["ours"]
    report.figures(
        "the norms of a guided step", {f"{name}, ms": ms for name, ms in total.items()} | {"× PyTorch's": gain}
    )


def shapes(*, small: bool) -> Counter[Shape]:
    """How often each shape comes before SiLU in the resnets of the UNet, which runs without memory."""
    made = sd15.parts(torch.device("meta"), torch.float16, kind="small" if small else "whole")
    with torch.device("meta"):
        unet = inflate(made.unet).half()
    found = Counter[Shape]()

    def note(_module: object, given: tuple[Tensor, ...], result: Tensor) -> None:
        found.update(Shape(x.shape[1], x.shape[2]) for x in (given[0], result))

    for module in unet.modules():
        if isinstance(module, VideoResnetBlock):
            module.register_forward_hook(note)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents, text = (
        torch.empty(size, device="meta", dtype=torch.float16) for size in ((1, 4, 2, side, side), (1, 7, width))
    )
    unet(latents, torch.zeros(1, device="meta"), text)
    return found


def _one_shape(report: Report, shape: Shape, count: int, frames: int) -> dict[str, float]:
    """Rows of the forward by both and of the backward, and of other tiles → milliseconds of the forward by name."""
    name = f"c {shape.c}, {shape.side}²"
    given = inputs(report, shape, frames)
    ours = partial(group_norm, *given, frames, GROUPS, EPS, silu=True)
    theirs = partial(naive.group_norm, *given, frames, GROUPS, EPS, silu=True)
    found: dict[str, float] = {}
    with torch.no_grad():
        exact = naive.group_norm(*(x.float() for x in given), frames, GROUPS, EPS, silu=True)
        for who, call in (("PyTorch's", theirs), ("ours", ours)):
            wrong = error([call()], [exact])
            if who == "ours" and not wrong < FORWARD * torch.finfo(given[0].dtype).eps:
                report.fault(f"{name}: ours", f"wrong by {wrong:.1e}: not timed")
                continue
            timing = measure(call)
            found[who] = timing.median * 1e3
            rate = 3 * given[0].nbytes / timing.median  # read twice, written once
            more = {"× PyTorch's": found["PyTorch's"] / found[who]} if who == "ours" else {}
            report.figures(
                f"{name}: {who}", milliseconds(timing) | {"a step": count, "error": wrong, "bytes/s": rate} | more
            )
        if given[0].is_cuda:
            _tiles(report, name, given, frames)
    _backward(report, name, given, frames)
    return found


def inputs(report: Report, shape: Shape, frames: int) -> list[Tensor]:
    """Random x, its channels last, weight and bias."""
    torch.manual_seed(0)
    kind = {"device": report.device, "dtype": report.dtype}
    x = torch.randn(CLIPS * frames, shape.c, shape.side, shape.side, **kind)
    return [x.contiguous(memory_format=torch.channels_last), *(torch.randn(shape.c, **kind) for _ in range(2))]


def error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest of the root mean squares of the differences, each as a share of its truth's; NaN is infinite."""
    shares = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(results, truth, strict=True)]
    return torch.stack(shares).nan_to_num(torch.inf).max().item()


def _backward(report: Report, name: str, given: list[Tensor], frames: int) -> None:
    grad, before = torch.randn_like(given[0]), {}

    def gradients(norm: Callable[..., Tensor], tensors: Sequence[Tensor], of: Tensor) -> Callable[[], Sequence[Tensor]]:
        wanted = [x.detach().requires_grad_() for x in tensors]
        return lambda: torch.autograd.grad(norm(*wanted, frames, GROUPS, EPS, silu=True), wanted, of)

    exact = gradients(naive.group_norm, [x.float() for x in given], grad.float())()
    for who, norm in (("PyTorch's", naive.group_norm), ("ours", group_norm)):
        call, row = gradients(norm, given, grad), f"{name}, forward and backward: {who}"
        wrong = error(call(), exact)
        if who == "ours" and not wrong < BACKWARD * torch.finfo(grad.dtype).eps:
            report.fault(row, f"wrong by {wrong:.1e}: not timed")
            continue
        timing = measure(call)
        before[who] = timing.median
        report.figures(row, milliseconds(timing) | {"error": wrong, "× PyTorch's": before["PyTorch's"] / timing.median})


def _tiles(report: Report, name: str, given: list[Tensor], frames: int) -> None:
    """The fastest of the candidates, which are all right or left out."""
    from tav_opt.kernels.group_norm_kernel import CANDIDATES, launch, tile_for

    x = given[0]
    exact = launch(*given, frames, GROUPS, EPS, True)[0]
    own = tile_for(frames * x.shape[2] * x.shape[3], x.shape[1], CLIPS)
    found = {}
    for tile in dict.fromkeys((own, *CANDIDATES)):
        call = partial(launch, *given, frames, GROUPS, EPS, True, tile=tile)
        try:
            if not error([call()[0]], [exact]) < FORWARD * torch.finfo(x.dtype).eps:
                raise ArithmeticError("it is wrong")
            found[tile] = measure(call).median * 1e3
        except Exception as refused:  # compilers and drivers refuse in many ways of their own
            report.left_out(f"{name}, {tuple(tile)}", f"{type(refused).__name__}: {first_line(refused)[:200]}")
    if found:
        best = min(found, key=lambda tile: found[tile])
        gain = {"× the own": found[own] / found[best]} if own in found else {}
        figures = {"tile": str(tuple(best)), "ms": found[best], "own": str(tuple(own)), "tried": len(found)}
        report.figures(f"{name}: the fastest tile", figures | gain)
