"""A program of fixed shapes as a CUDA graph: it is recorded at the second call, and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Replayed(Generic[T]):
    """Launches that read `buffers`, made once, and return their outputs; off CUDA they are made anew at each call.

    One call at a time; outputs are overwritten by the next. `pool` is memory that graphs of one owner share, who
    runs one of them at a time and keeps no output: what torch.cuda.graph_pool_handle() names.
    """

    def __init__(
        self, launch: Callable[[], T], buffers: Mapping[str, Tensor], device: torch.device, pool: Any = None
    ) -> None:
        self._launch, self.buffers, self._device, self._pool = launch, buffers, device, pool
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.forget()

    def forget(self) -> None:
        """After other weights were put in: the recorded launches are of the old ones."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: T | None = None
        self._calls = 0

    def __call__(self, inputs: Mapping[str, Tensor]) -> T:
        """Inputs of exactly the buffers' shapes → what `launch` returns. The host waits for nothing."""
        with self._on_stream():
            for name, buffer in self.buffers.items():
                buffer.copy_(inputs[name], non_blocking=True)
            output = self._run()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return output

    def _on_stream(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def _run(self) -> T:
        self._calls += 1
        if self._stream is None or self._calls == 1:  # the first call may compile and allocate: no graph of it
            return self._launch()
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._output = self._launch()
            self._graph = graph
        assert self._output is not None
        self._graph.replay()
        return self._output


class SharedValues:
    """Device memory that all programs of a base read a clip's values from: a switch is one copy of each value."""

    def __init__(self, buffers: dict[str, Tensor]) -> None:
        self.buffers = buffers
        self._clip: object = None

    def hold(self, clip: object, values: Mapping[str, Tensor]) -> None:
        """Puts a clip's values there unless they are; `clip` says whose they are."""
        if self._clip is clip:
            return
        for name, buffer in self.buffers.items():
            buffer.copy_(values[name], non_blocking=True)
        self._clip = clip
