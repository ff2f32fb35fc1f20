"""Several edits in hand, and one call of the network for all of them at every step: continuous batching.

Each edit runs its own loop, in a thread of its own; only their calls of `predict` are put together. So an edit joins
and leaves between any two steps, and all else (guidance, noise, progress, previews, its end) stays its own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from tav_opt.ddim import Text, Timestep, timestep_rows
from tav_opt.serving.report import Report


class RowwiseEngine(Protocol):
    """An engine of one clip whose rows may be at different timesteps."""

    @property
    def revision(self) -> str: ...

    def predict(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        """`timestep`: one for all rows, or int64 (b,)."""

    def predict_with_features(self, latents: Tensor, timestep: Timestep, text: Tensor) -> tuple[Tensor, Tensor]:
        """The same."""


Answer = Tensor | tuple[Tensor, ...]


def shared_by(engine: RowwiseEngine) -> str:
    """Whose calls may be one: all edits of one export of a clip, on one base, by one engine.

    That fixes frames and size, and the clip's own values, which no engine takes row by row. Latents, timestep and text
    go row by row, and the rest each edit computes from its own rows; so steps, guidance (its scale, or none), negative
    prompt, eta, seed, source, and how many prompts there are may differ, and one may invert while another samples.
    """
    return engine.revision


@dataclass(eq=False)
class _Call:
    latents: Tensor
    timestep: Timestep
    text: Text
    ask: Literal["predict", "predict_with_features"] = "predict"
    together: int = 1
    """How many were answered with it."""
    answer: Answer | Exception | None = None

    @property
    def told(self) -> Mapping[str, Tensor]:
        """What the network is told, by name: calls that tell it of the same may be one."""
        return {"text": self.text} if isinstance(self.text, Tensor) else self.text


class Batches:
    """What the edits of one worker share; `on_trouble` is told of calls that fail together and are made apart."""

    def __init__(self, on_trouble: Callable[[str], None] = lambda _: None) -> None:
        self._on_trouble = on_trouble
        self._lock = threading.Lock()
        self._groups: dict[str, _Group] = {}
        self._prompts: Counter[str] = Counter()

    def prompts(self, engine: RowwiseEngine) -> int:
        """How many prompts the edits have, together and in one batch of each, that share calls with one of `engine`."""
        return self._prompts[shared_by(engine)]

    @contextmanager
    def counted(self, engine: RowwiseEngine, prompts: int) -> Iterator[None]:
        """So many more, in the block."""
        with self._lock:
            self._prompts[shared_by(engine)] += prompts
        try:
            yield
        finally:
            with self._lock:
                self._prompts[shared_by(engine)] -= prompts

    @contextmanager
    def joined(self, engine: RowwiseEngine, report: Report) -> Iterator[Any]:
        """The engine, whose calls of `predict` in the block are shared from the first one on, to the block's end.

        In between nothing may wait for another edit, since that would wait for this one's next call.
        """
        with self._lock:
            group = self._groups.setdefault(shared_by(engine), _Group(self._on_trouble))
            group.users += 1
        member = _Member(engine, group, report)
        try:
            yield member
        finally:
            group.leave(member)
            with self._lock:
                group.users -= 1
                if not group.users:
                    del self._groups[shared_by(engine)]


class _Group:
    """Edits that share calls. The last one to ask, or to stop another's waiting by leaving, starts a call."""

    def __init__(self, on_trouble: Callable[[str], None]) -> None:
        self._on_trouble = on_trouble
        self._changed = threading.Condition()
        self._members: set[_Member] = set()
        self._waiting: list[_Call] = []
        self.users = 0
        """Who may become members; Batches counts them."""

    def predict(self, member: _Member, call: _Call) -> None:
        """Answers the call, together with those of all other members."""
        with self._changed:
            self._members.add(member)
            self._waiting.append(call)
            self._changed.wait_for(lambda: call.answer is not None or len(self._waiting) == len(self._members))
            if call.answer is not None:
                return
            batch, self._waiting = self._waiting, []
        for alike in _alike(batch):
            self._answer(member.engine, alike)
        with self._changed:
            self._changed.notify_all()

    def leave(self, member: _Member) -> None:
        with self._changed:
            self._members.discard(member)
            self._changed.notify_all()

    def _answer(self, engine: RowwiseEngine, batch: list[_Call]) -> None:
        try:
            for call, answer in zip(batch, _together(engine, batch), strict=True):
                call.together, call.answer = len(batch), answer
        except Exception as error:  # what is wrong with one must not fail the others
            if len(batch) == 1:
                batch[0].answer = error
                return
            self._on_trouble(f"a step of {len(batch)} edits in one batch failed, each is done alone: {error}")
            for call in batch:
                self._answer(engine, [call])


def _told(text: Text) -> Mapping[str, Tensor]:
    return {"text": text} if isinstance(text, Tensor) else text


def _alike(batch: list[_Call]) -> list[list[_Call]]:
    """Those together whose network is asked for and told the same things: of others it is another graph."""
    found: dict[tuple[str, frozenset[str]], list[_Call]] = {}
    for call in batch:
        found.setdefault((call.ask, frozenset(_told(call.text))), []).append(call)
    return list(found.values())


def _together(engine: RowwiseEngine, batch: list[_Call]) -> tuple[Answer, ...]:
    """One call of the engine for all; what each edit asked for."""
    ask: Callable[[Tensor, Timestep, Any], Answer] = getattr(engine, batch[0].ask)
    if len(batch) == 1:
        return (ask(batch[0].latents, batch[0].timestep, batch[0].text),)
    timesteps = torch.cat([timestep_rows(call.timestep, call.latents) for call in batch])
    latents = torch.cat([call.latents for call in batch])
    told = {name: torch.cat([_told(call.text)[name] for call in batch]) for name in _told(batch[0].text)}
    text = told["text"] if len(told) == 1 else told
    answer, rows = ask(latents, timesteps, text), [len(call.latents) for call in batch]
    if isinstance(answer, Tensor):
        return answer.split(rows)
    return tuple(zip(*(part.split(rows) for part in answer), strict=True))


class _Member:
    """An edit's engine, as Batches.joined has it."""

    def __init__(self, engine: RowwiseEngine, group: _Group, report: Report) -> None:
        self.engine, self._group, self._report = engine, group, report

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def predict(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        return cast(Tensor, self._answered(_Call(latents, timestep, text)))

    def predict_with_features(self, latents: Tensor, timestep: Timestep, text: Tensor) -> tuple[Tensor, Tensor]:
        call = _Call(latents, timestep, text, "predict_with_features")
        return cast(tuple[Tensor, Tensor], self._answered(call))

    def _answered(self, call: _Call) -> Answer:
        self._group.predict(self, call)
        self._report.together = max(self._report.together, call.together)
        if isinstance(call.answer, Exception):
            raise call.answer
        assert call.answer is not None
        return call.answer
