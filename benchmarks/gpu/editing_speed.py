"""A guided step and whole edits of Stable Diffusion 1.5 with random weights, by each way to run the UNet.

A way is compared by what it predicts in one step: over fifty of them random weights make noise of any rounding.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import sd15
import torch
from attention import Call, milliseconds, peak_mib
from common import timed
from report import Report
from torch import Tensor

from tav_opt import editing
from tav_opt.config import PRESETS, EditConfig, first_line
from tav_opt.contract import ClipInfo
from tav_opt.ddim import Predict, Timestep, guide, timestep_rows
from tav_opt.engines.cuda_graph import Replayed
from tav_opt.engines.pytorch import TorchEngine
from tav_opt.kernels import naive
from tav_opt.models import StableDiffusion, encode_prompt
from tav_opt.upsampling import FusedUpsample

T = TypeVar("T")
PEER = "concatenation + SDPA"
EAGER_ERROR = {torch.float16: 0.05, torch.float32: 1e-4}
"""What eager PyTorch may differ from the next wider dtype, in root mean squares; the other ways, twice what it does."""
SLACK = 1e-5
WIDER = {torch.float16: torch.float32, torch.float32: torch.float64}
STEPS_IN_A_DRY_RUN = 4


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run the UNet."""

    name: str
    ours: bool
    make: Callable[[], Predict]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A clip on a model, as an edit has them."""

    sd: StableDiffusion
    latents: Tensor
    """(1, c, f, h, w)."""
    text: Tensor
    """(2, tokens, width): of guidance."""

    @classmethod
    def of(cls, report: Report) -> Work:
        """24 frames of 512²; in a dry run 3 of as little as the model can."""
        sd = sd15.stable_diffusion(report.device, report.dtype, small=report.dry)
        side, frames = sd.unet.config.sample_size, 3 if report.dry else 24
        latents = torch.randn(1, 4, frames, side, side, device=report.device, dtype=report.dtype)
        return cls(sd=sd, latents=latents, text=encode_prompt(sd, ["", "a red thing"]))

    def predicted(self, predict: Predict) -> Tensor:
        """What both prompts of guidance make of one step."""
        return predict(torch.cat([self.latents] * 2), 501, self.text)

    def guided(self, predict: Predict) -> Tensor:
        """The guided noise of one step."""
        return guide(*self.predicted(predict).chunk(2), 7.5)


def ways(work: Work, report: Report, *, compile_it: bool = True) -> Iterator[Way]:
    """Ours, each on top of the one before, then the peers: to be made and used in this order."""
    sd = work.sd
    unet = cache(lambda: compiled_unet(sd, report) if compile_it else channels_last(sd).unet)
    yield Way(name="eager", ours=True, make=lambda: within(without_norms, sd.predict))
    yield Way(name="channels-last", ours=True, make=lambda: within(without_norms, channels_last(sd).predict))
    yield Way(name="+ GroupNorm kernel", ours=True, make=lambda: within(upsampled_first, channels_last(sd).predict))
    yield Way(name="+ transposed upsampling", ours=True, make=lambda: channels_last(sd).predict)
    yield Way(name="compiled", ours=True, make=lambda: on_plain_tensors(unet()))
    yield Way(name="compiled + CUDA graph", ours=True, make=lambda: Replaying(unet()))
    yield Way(name=PEER, ours=False, make=lambda: within(without_kernels, channels_last(sd).predict))
    if not report.dry:  # the same trace again would take half of a dry run's time
        yield Way(name=f"{PEER}, compiled", ours=False, make=lambda: _compiled_anew(sd, report))


def channels_last(sd: StableDiffusion) -> StableDiffusion:
    """UNet and VAE with convolutions whose channels come last, in place."""
    for part in (sd.unet, sd.vae):
        part.to(memory_format=torch.channels_last)
    return sd


def compiled_unet(sd: StableDiffusion, report: Report) -> Callable[..., Tensor]:
    """One graph for each number of clips; a dry run traces it, and compiles nothing."""
    backend = "eager" if report.dry else "inductor"
    return torch.compile(channels_last(sd).unet, fullgraph=True, dynamic=False, backend=backend)


def _plain(latents: Tensor, timestep: Timestep, text: Tensor) -> dict[str, Tensor]:
    """Copies in one layout: with every other one the UNet would be compiled again."""
    given = {"latents": latents, "timesteps": timestep_rows(timestep, latents), "text": text}
    return {name: torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x) for name, x in given.items()}


def on_plain_tensors(unet: Callable[..., Tensor]) -> Predict:
    """A compiled UNet as the loop asks for it."""

    @torch.no_grad()
    def predict(latents: Tensor, timestep: Timestep, text: Tensor) -> Tensor:
        return unet(*_plain(latents, timestep, text).values())

    return predict


def _compiled_anew(sd: StableDiffusion, report: Report) -> Predict:
    torch._dynamo.reset()
    return within(without_kernels, on_plain_tensors(compiled_unet(sd, report)))


def within(context: Callable[[], AbstractContextManager[None]], predict: Predict) -> Predict:
    """The same UNet with something of it in another way."""

    def instead(*arguments: Any) -> Tensor:
        with context():
            return predict(*arguments)

    return instead


@contextmanager
def upsampled_first() -> Iterator[None]:
    """Upsampling as diffusers does it, before its convolution."""
    with patch.object(FusedUpsample, "is_transposed", lambda _: False):
        yield


@contextmanager
def without_norms() -> Iterator[None]:
    """The same, and group norms by their naive twin, on transposed copies; those of single frames by PyTorch's own."""
    with (
        upsampled_first(),
        patch("tav_opt.unet.group_norm", naive.group_norm),
        patch("tav_opt.unet.on_kernel", lambda _: False),
    ):
        yield


@contextmanager
def without_kernels() -> Iterator[None]:
    """All that, and both attentions by their naive twins: 2n keys in memory, as one has it without kernels."""
    with (
        without_norms(),
        patch("tav_opt.attention.sparse_causal_attention", naive.sparse_causal_attention),
        patch("tav_opt.attention.temporal_attention", naive.temporal_attention),
    ):
        yield


class Replaying:
    """A UNet as a CUDA graph for each number of clips."""

    def __init__(self, unet: Callable[..., Tensor]) -> None:
        self._unet = unet
        self._graphs: dict[int, Replayed[Tensor]] = {}

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Timestep, text: Tensor) -> Tensor:
        given = _plain(latents, timestep, text)
        if len(latents) not in self._graphs:
            buffers = {name: x.clone() for name, x in given.items()}
            launch = partial(self._unet, *buffers.values())
            self._graphs[len(latents)] = Replayed(launch, buffers, latents.device)
        return self._graphs[len(latents)](given).clone()  # the next call writes there


@torch.no_grad()
def guided_step(report: Report) -> None:
    """Each way's error, then its time and memory."""
    work = Work.of(report)
    truth = _truth(work)
    report.row("the model", GiB=peak_gib(), frames=work.latents.shape[2], side=work.latents.shape[-1])
    allowed, found = EAGER_ERROR[report.dtype], dict[str, float]()
    for way in ways(work, report):
        reset_peak()
        try:
            predict = way.make()
            wrong, first = _first(lambda predict=predict: _error(work.predicted(predict), truth))
            if not wrong <= allowed:
                raise ArithmeticError(f"differs from {WIDER[report.dtype]} by {wrong:.2g}, {allowed:.2g} is allowed")
            timing = timed("", partial(work.guided, predict), calls=1 if report.dry else 10, warmup=2)
        except Exception as error:  # of a compiler, or too little memory: the other ways are as good as before
            _failed(report, way, error)
            continue
        allowed = 2 * wrong + SLACK if way.name == "eager" else allowed
        found[way.name] = timing.median * 1e3
        figures = milliseconds(timing) | {"error": wrong, "peak GiB": peak_gib(), "first call s": first}
        report.figures(way.name, figures | _gains(found, way.name))
    best(report, "the best of ours", "ms", found)


def _truth(work: Work) -> Tensor:
    """The prediction by the next wider dtype, whose convolutions do not round to TF32."""
    wider = WIDER[work.latents.dtype]
    wide = replace(work.sd, unet=deepcopy(work.sd.unet).to(wider))
    given = replace(work, sd=wide, latents=work.latents.to(wider), text=work.text.to(wider))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return given.predicted(wide.predict)


def _error(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth."""
    return float((found.to(truth.dtype) - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def _first(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and the seconds of this first time, which may compile."""
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _failed(report: Report, way: Way, error: Exception) -> None:
    reason = f"{type(error).__name__}: {first_line(error)[:300]}"
    (report.fault if way.ours else report.left_out)(way.name, reason)


def _gains(found: dict[str, float], name: str) -> dict[str, float]:
    return {"× eager": found["eager"] / found[name]} if "eager" in found and name != "eager" else {}


def best(report: Report, row: str, figure: str, found: dict[str, float], **more: str) -> None:
    """The quickest of ours, and how many times as fast as each peer it is; `more` is said of it."""
    peers = {name: value for name, value in found.items() if PEER in name}
    ours = {name: value for name, value in found.items() if name not in peers}
    if not ours:
        report.fault(row, "none of them ran")
        return
    name = min(ours, key=lambda name: ours[name])
    gains = {f"× {peer}": value / ours[name] for peer, value in peers.items()}
    report.figures(row, {figure: ours[name], "by": name} | more | gains)


def reset_peak() -> None:
    """Counts from what is held now, which is nothing that nobody needs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Memory at its peak since `reset_peak`, weights included; 0 off CUDA, where nobody counts."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


@dataclass(frozen=True, kw_only=True)
class Engine(TorchEngine):
    """A clip whose UNet is run in some way."""

    by: Predict

    def predict(self, latents: Tensor, timestep: Timestep, text: Tensor) -> Tensor:
        return self.by(latents, timestep, text)

    def decode(self, latents: Tensor) -> np.ndarray:
        if not latents.isfinite().all():
            raise ArithmeticError("the latents of the edit are not finite")
        return super().decode(latents)


def whole_edit(report: Report) -> None:
    """Edits from the kept inversion, text and VAE included: exact by every way, presets by ours but the plainest."""
    work = Work.of(report)
    found: dict[str, dict[str, float]] = {preset: {} for preset in PRESETS}
    for way in ways(work, report, compile_it=not report.dry):
        if way.name in ("compiled", f"{PEER}, compiled"):  # the graph shows the first, a step the second
            continue
        try:
            engine = _engine(work, way.make())
            for preset in PRESETS if way.name != "eager" and way.ours else ("exact",):
                found[preset][way.name] = _one_edit(report, engine, preset, way.name)
        except Exception as error:  # the other ways are as good as before
            _failed(report, way, error)
    for preset, seconds in found.items():
        best(report, f"{preset}: the best of ours", "seconds", seconds)
    _vae(report, _engine(work, work.sd.predict))


def _engine(work: Work, by: Predict) -> Engine:
    factor, (frames, height, width) = work.sd.vae_factor, work.latents.shape[2:]
    info = ClipInfo(
        base="random",
        base_hash="0" * 64,
        prompt="a moving thing",
        frames=frames,
        height=height * factor,
        width=width * factor,
        fps=8.0,
        inversion_steps=50,
    )
    return Engine(sd=work.sd, info=info, source_latents=work.latents, inverted_latents=work.latents, by=by)


def _one_edit(report: Report, engine: Engine, preset: Any, name: str) -> float:
    """A row → its seconds."""
    config = EditConfig.of_preset(preset, prompts=("a red thing",))
    config = replace(config, steps=STEPS_IN_A_DRY_RUN) if report.dry else config
    call: Call = lambda: editing.edit(engine, config)  # noqa: E731
    reset_peak()
    _, first = _first(call)
    timing = timed("", call, calls=1 if report.dry else 2, warmup=0)
    figures = {"seconds": timing.median, "steps": config.steps, "first call s": first, "peak GiB": peak_gib()}
    report.figures(f"{preset}: {name}", figures)
    return timing.median


def _vae(report: Report, engine: Engine) -> None:
    """Both ways of the VAE, which every edit takes as it is."""
    frames = engine.decode(engine.source_latents)[0]
    for name, call in (
        ("VAE decode", partial(engine.decode, engine.source_latents)),
        ("VAE encode", partial(engine.encode_video, frames)),
    ):
        report.figures(name, milliseconds(timed("", call, calls=3)) | {"peak MiB": peak_mib(call)})
