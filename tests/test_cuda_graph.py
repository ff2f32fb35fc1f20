"""Programs as CUDA graphs, over a stand-in for CUDA's: recorded once, at the second call, and replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tav_opt.engines.cuda_graph import Replayed, SharedValues


class Recorded:
    """What CUDAGraph is: launches that run again, on the same memory, when it is replayed."""

    recording: Recorded | None = None

    def __init__(self) -> None:
        self.launches: list[Any] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for launch in self.launches:
            launch()


class Program:
    """Doubles `x` and adds the clip's value, into memory that it keeps."""

    def __init__(self, values: SharedValues) -> None:
        self.x, self.out, self.values = torch.zeros(2), torch.zeros(2), values
        self.launched = 0

    def __call__(self) -> Tensor:
        self.launched += 1
        if Recorded.recording is None:
            self._compute()
        else:
            Recorded.recording.launches.append(self._compute)  # a capture runs nothing
        return self.out

    def _compute(self) -> None:
        torch.add(2 * self.x, self.values.buffers["v"], out=self.out)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The graphs that are made, on a device that CUDA is in name."""
    made: list[Recorded] = []

    def new() -> Recorded:
        made.append(Recorded())
        return made[-1]

    @contextmanager
    def capture(graph: Recorded, **_: Any) -> Iterator[None]:
        Recorded.recording = graph
        yield
        Recorded.recording = None

    stream = SimpleNamespace(wait_stream=lambda _other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: stream)
    return made


def test_recorded_at_the_second_call_and_replayed_with_each_calls_inputs_and_each_clips_values(
    graphs: list[Recorded],
) -> None:
    values = SharedValues({"v": torch.zeros(2)})
    program = Program(values)
    replayed = Replayed(program, {"x": program.x}, torch.device("cuda"))
    for number, clip in enumerate(("a", "a", "a", "b", "b", "a")):
        values.hold(clip, {"v": torch.full((2,), float(ord(clip)))})
        found = replayed({"x": torch.full((2,), float(number))})
        assert found.tolist() == [2 * number + ord(clip)] * 2, number
    assert len(graphs) == 1 and graphs[0].replays == 5 and program.launched == 2
    replayed.forget()
    replayed({"x": torch.ones(2)})
    assert len(graphs) == 1 and program.launched == 3, "after other weights nothing old is replayed"
    replayed({"x": torch.ones(2)})
    assert len(graphs) == 2 and replayed({"x": torch.ones(2)}).tolist() == [2 + ord("a")] * 2


def test_off_cuda_each_call_launches(graphs: list[Recorded]) -> None:
    program = Program(SharedValues({"v": torch.ones(2)}))
    replayed = Replayed(program, {"x": program.x}, torch.device("cpu"))
    assert [replayed({"x": torch.full((2,), x)}).tolist() for x in (1.0, 2.0, 3.0)] == [[3, 3], [5, 5], [7, 7]]
    assert not graphs and program.launched == 3


def test_a_value_is_copied_once_a_switch() -> None:
    values = SharedValues({"v": torch.zeros(2)})
    mine = {"v": torch.ones(2)}
    values.hold("a", mine)
    mine["v"] = torch.full((2,), 5.0)
    values.hold("a", mine)
    assert values.buffers["v"].tolist() == [1, 1]
    values.hold("b", mine)
    assert values.buffers["v"].tolist() == [5, 5]
