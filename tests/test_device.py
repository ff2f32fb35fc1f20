"""What crosses between host and device in an edit: nothing from the first step to the decoded frames."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import SHORT, FakeEngine, answered, editor
from torch.utils._python_dispatch import TorchDispatchMode

from tav_opt import ddim, editing
from tav_opt.config import EditConfig
from tav_opt.contract import to_tensors
from tav_opt.device import Pace
from tav_opt.engines.exported import ExportedEngine

DEVICE = torch.device("meta")
"""As far from the processor as a GPU is: nothing can be read from it unnoticed."""


class Crossings(TorchDispatchMode):
    """Notes every copy between devices and every number that Python reads; what comes to the host are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal"):
            self.found.append(f"{name} on {args[0].device}")
            return 0
        if name == "_to_copy" and (target := torch.device(kwargs.get("device") or args[0].device)) != args[0].device:
            self.found.append(f"{tuple(args[0].shape)} to {target}")
            return torch.zeros_like(args[0], **kwargs)
        if name == "copy_" and args[0].device != args[1].device:
            self.found.append(f"{tuple(args[1].shape)} to {args[0].device}")
            return args[0]
        return func(*args, **kwargs)


class Stand:
    """`exported.Graphs` of nothing: each graph gives zeros of its shape on the device."""

    device, revision, frames_at_once, has_threads = DEVICE, "r", 2, False

    def extra_bytes(self, items: dict[str, int]) -> int:
        return 0


def zeros(name: str, *shape: int) -> Callable[..., dict[str, torch.Tensor]]:
    def call(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        moved = [value.to(DEVICE) for value in inputs.values()]
        return {name: torch.zeros(len(moved[0]), *shape, device=DEVICE)}

    return call


@pytest.fixture
def engine() -> ExportedEngine:
    base = SimpleNamespace(
        graphs=Stand(),
        schedule=FakeEngine.schedule,
        engine="onnxruntime",
        added={},
        unet_for=lambda told: "unet",
        tokenize=lambda prompts: torch.zeros(len(prompts), 7, dtype=torch.int64),
    )
    return ExportedEngine(
        base=base,  # type: ignore[arg-type]
        info=FakeEngine.info,
        revision="r1",
        source_latents=torch.zeros(1, 4, 2, 2, 2, device=DEVICE),
        inverted_latents=torch.zeros(1, 4, 2, 2, 2, device=DEVICE),
        calls={
            "text_encoder": zeros("text", 7, 5),
            "unet": zeros("noise", 4, 2, 2, 2),
            "vae_decoder": zeros("pixels", 3, 8, 8),
        },
        held_bytes=0,
    )


CONFIG = EditConfig(prompts=("a",), steps=3, guidance_scale=7.5, inversion_steps=4)
PUT = ["(1, 7) to meta", "(4,) to meta"]
"""What an inversion puts on the device before its first step: its text, and all its timesteps."""


@pytest.mark.parametrize("served", [False, True], ids=["editing", "serving"])
def test_only_the_frames_come_to_the_host_and_nothing_crosses_in_the_loop(engine: ExportedEngine, served: bool) -> None:
    with Crossings() as crossings:
        if served:
            (*_, last), _ = answered(editor(engine), to_tensors("toy", CONFIG))
            frames = last["frames"]
        else:
            frames = editing.edit(engine, CONFIG, on_progress=lambda *step: crossings.found.append(f"{step[1]}"))
    assert frames.shape == (1, 2, 8, 8, 3)
    inversion, sampling = (["(2, 7) to meta", *PUT], ["(3,) to meta"])
    told = ([], []) if served else (["1", "2", "3", "4"], ["1", "2", "3"])
    finite = ["_local_scalar_dense on meta"]  # whether all of the inverted latents are numbers: once
    assert crossings.found == [*inversion, *told[0], *finite, *sampling, *told[1], "(2, 8, 8, 3) to cpu"]


def test_each_step_of_a_sampling_with_eta_copies_its_noise_and_nothing_else(engine: ExportedEngine) -> None:
    with Crossings() as crossings:
        editing.edit(engine, EditConfig(prompts=("a",), steps=3, eta=0.5, inversion_steps=7))
    noise = ["(1, 4, 2, 2, 2) to meta"] * 3
    assert crossings.found == ["(2, 7) to meta", "(3,) to meta", *noise, "(2, 8, 8, 3) to cpu"]


def test_a_number_read_in_the_loop_would_be_noticed(engine: ExportedEngine) -> None:
    with Crossings() as crossings:
        editing.edit(engine, SHORT, on_progress=lambda *_: float(engine.source_latents.sum()))
    assert crossings.found.count("_local_scalar_dense on meta") == SHORT.steps


def test_a_loop_on_a_gpu_waits_for_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else progress and cancellation would be a whole edit ahead of the card. A stand-in plays CUDA's events."""
    done: list[str] = []

    class Event:
        def record(self, stream: int) -> None:
            self.number = sum(entry.startswith("launched") for entry in done) + 1
            done.append(f"launched {self.number}")

        def synchronize(self) -> None:
            done.append(f"waited for {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 0)
    monkeypatch.setattr(ddim, "Pace", lambda device: Pace(torch.device("cuda")))
    ddim.sample(lambda latents, *_: latents, torch.zeros(1, 4, 2, 2, 2), torch.zeros(1), FakeEngine.schedule, 3)
    assert done == ["launched 1", "launched 2", "waited for 1", "launched 3", "waited for 2"]
    done.clear()
    Pace(torch.device("cpu")).keep()
    assert not done
