"""Tuning of Stable Diffusion 1.5 with random weights on 24 frames of 512²: its speed, and whether it repeats itself."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import sd15
import torch
from common import apart
from editing_speed import PEER, best, channels_last, peak_gib, reset_peak, without_kernels
from report import Report
from torch import Tensor

from tav_opt import models
from tav_opt.config import TrainConfig, first_line
from tav_opt.ddim import Schedule
from tav_opt.models import StableDiffusion
from tav_opt.tuning_loop import deterministic
from tav_opt.tuning_step import Draw, Training, begin, denoising_loss, seeded_draw, train_step

WARM_UP, MEASURED = 5, 20
"""Steps, of one draw each; in the first ones the loss's scale finds its place."""
STEPS = TrainConfig.steps
GRADIENT_ERROR = {torch.float16: 0.05, torch.float32: 1e-3}
"""What gradients by our kernels may differ from those by the naive twins, in root mean squares over all of them."""
LOSS_SCALE = 1024.0
"""Of the compared gradients: those of halves would be lost below it."""
COMPARED, COMPARED_FRAMES = "gradients against the naive twins'", 4
WHOLE = f"{STEPS} steps in a row"
REPEATED = 30


@dataclass(frozen=True, kw_only=True)
class Run:
    """A tuning that has begun, and what its steps take."""

    sd: StableDiffusion
    config: TrainConfig
    training: Training
    latents: Tensor
    text: Tensor
    draw: Draw

    @classmethod
    def begun(
        cls, device: torch.device, dtype: torch.dtype, *, small: bool, checkpointing: bool = False, frames: int = 0
    ) -> Run:
        """The same at every call on one kind of device: weights, clip, caption and noise are seeded."""
        sd = sd15.stable_diffusion(device, dtype, small=small)
        config = TrainConfig(gradient_checkpointing=checkpointing)
        side, frames = sd.unet.config.sample_size, frames or (3 if small else 24)
        latents = torch.randn(1, 4, frames, side, side, device=device)
        text = models.encode_prompt(sd, "a moving thing").float()
        training = begin(sd.unet, config)
        draw = seeded_draw(config.seed, latents, sd.schedule)
        return cls(sd=sd, config=config, training=training, latents=latents, text=text, draw=draw)

    def step(self) -> float:
        """One optimiser step → its loss."""
        unet, schedule = self.sd.unet, self.sd.schedule
        return train_step(self.training, unet, self.latents, self.text, schedule, self.config, self.draw)

    def gradients(self) -> Tensor:
        """Of LOSS_SCALE times the first step's loss, those of all trained parameters in a row; nothing is changed."""
        schedule: Schedule = self.sd.schedule
        loss = denoising_loss(self.sd.unet, self.latents, self.text, schedule, *self.draw(0, 0))
        found = torch.autograd.grad(LOSS_SCALE * loss, list(self.training.parameters.values()))
        return torch.cat([gradient.flatten().float() for gradient in found])


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to tune."""

    name: str
    last: bool = True
    """Whether the channels of convolutions come last."""
    checkpointing: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


WAYS = (
    Way(name="eager", last=False),
    Way(name="channels-last"),
    Way(name="channels-last, gradient checkpointing", checkpointing=True),
    Way(name=PEER, around=without_kernels),
)


def tuning_speed(report: Report) -> None:
    """Gradients against the naive twins' first, then the time and memory of each way, then all steps by the best."""
    _tried(report, COMPARED, partial(_check_gradients, report))
    found = {way.name: _tried(report, way.name, partial(_speed, report, way)) for way in WAYS}
    seconds = {name: STEPS * median for name, median in found.items() if median is not None}
    taken = f"extrapolated from {_measured(report)} steps"
    if ours := [way for way in WAYS if way.name in seconds and way.name != PEER]:
        quickest = min(ours, key=lambda way: seconds[way.name])
        whole = _tried(report, WHOLE, partial(_whole, report, quickest, seconds[quickest.name]))
        seconds = {name: value for name, value in seconds.items() if name in (quickest.name, PEER)}
        if whole is not None:
            seconds[quickest.name], taken = whole, f"{STEPS} steps run"
    best(report, "the best of ours", f"seconds for {STEPS} steps", seconds, taken=taken)


def _tried(report: Report, name: str, call: Callable[[], float | None]) -> float | None:
    """What a call returns; what it raises, too little memory most likely, is its row, and ends no other."""
    try:
        return call()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)[:300]}"
        (report.left_out if name == PEER else report.fault)(name, reason)
    return None


def _check_gradients(report: Report) -> None:
    """On few frames: the naive twins hold 2n keys of each, without checkpointing; tiles are those of any number."""
    reset_peak()
    run = Run.begun(report.device, report.dtype, small=report.dry, frames=COMPARED_FRAMES)
    with deterministic():
        ours = run.gradients()
        with without_kernels():
            naive = run.gradients()
    wrong = float((ours - naive).square().mean().sqrt() / naive.square().mean().sqrt())
    report.row(COMPARED, error=wrong, frames=COMPARED_FRAMES)
    if not wrong <= GRADIENT_ERROR[report.dtype]:
        report.fault(COMPARED, f"they differ by {wrong:.2g} in root mean squares")


@contextmanager
def _begun(report: Report, way: Way) -> Iterator[Run]:
    """A tuning that goes its way."""
    reset_peak()
    run = Run.begun(report.device, report.dtype, small=report.dry, checkpointing=way.checkpointing)
    if way.last:
        channels_last(run.sd)
    with way.around(), deterministic():
        yield run


def _speed(report: Report, way: Way) -> float:
    """A row → the median of a step's seconds."""
    with _begun(report, way) as run:
        times, losses = _timed_steps(run, WARM_UP if not report.dry else 1, _measured(report))
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    figures = {"s a step": float(median), "p10 s": float(p10), "p90 s": float(p90), "steps": len(times)}
    report.figures(way.name, figures | {"last loss": losses[-1], "peak GiB": peak_gib()})
    return float(median)


def _measured(report: Report) -> int:
    return 2 if report.dry else MEASURED


def _whole(report: Report, way: Way, expected: float) -> float | None:
    """All steps from the first on, where they are expected to end in time → their seconds; a dry run takes a few."""
    if expected > report.left():
        report.left_out(WHOLE, f"some {expected:.0f} s, and {max(0.0, report.left()):.0f} s are left")
        return None
    steps = 3 if report.dry else STEPS
    with _begun(report, way) as run:
        times, losses = _timed_steps(run, 0, steps)
    figures = {"seconds": sum(times), "steps": steps, "by": way.name, "last loss": losses[-1], "peak GiB": peak_gib()}
    report.figures(WHOLE, figures)
    return None if report.dry else sum(times)


def _timed_steps(run: Run, warm_up: int, measured: int) -> tuple[list[float], list[float]]:
    """Seconds and losses; a step ends with its loss on the processor."""
    losses = [run.step() for _ in range(warm_up)]
    times = []
    for _ in range(measured):
        start = time.perf_counter()
        losses.append(run.step())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times, losses


def repeat(report: Report) -> None:
    """Two tunings of one seed: as tuning does it, and as PyTorch does it unasked."""
    for name, asked in (("as tuning does it", True), ("as PyTorch does it", False)):
        once = partial(trained, report.device, report.dtype, asked, report.dry)
        try:
            first, second = (once(), once()) if report.dry else (apart(once), apart(once))
        except Exception as error:  # an operator may have no deterministic form
            reason = f"{type(error).__name__}: {first_line(error)[:300]}"
            (report.fault if asked else report.left_out)(name, reason)
            continue
        differ = [number for number, (a, b) in enumerate(zip(first, second, strict=True), start=1) if a != b]
        figures = {"losses or weights that differ": len(differ), "of": len(first)}
        report.figures(name, figures | ({"the first": differ[0]} if differ else {}))


def trained(device: torch.device, dtype: torch.dtype, asked: bool, dry: bool) -> list[str]:
    """Each step's loss to its last bit, and a hash of all trained parameters after the last one."""
    with deterministic() if asked else nullcontext():
        run = Run.begun(device, dtype, small=dry)
        losses = [run.step().hex() for _ in range(3 if dry else REPEATED)]
    digest = hashlib.sha256()
    for parameter in run.training.trained.values():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return [*losses, digest.hexdigest()]
