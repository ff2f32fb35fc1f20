"""The rows of one stage: each is in the file of results, and seen with its goal, as soon as it is known."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from stages import Goal, Stage

RESERVE = 45
"""Seconds of a stage's limit: to start its process and import PyTorch, and to end what it has begun."""


class Report:
    """Takes what a stage finds; a fault is of ours, what is left out of others', and either ends nothing."""

    def __init__(self, stage: Stage, results: Path, *, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.float16
        self.faults = 0
        self._stage, self._results = stage, results
        self._ends = time.monotonic() + stage.seconds - RESERVE

    def left(self) -> float:
        """Seconds in which something may still run; what would take longer is not begun, and that is said."""
        return self._ends - time.monotonic()

    def beside(self, name: str) -> Path:
        """A file beside the results."""
        return self._results.with_name(name)

    def row(self, name: str, **figures: Any) -> None:
        """Keeps figures by name: numbers, or texts."""
        self.figures(name, figures)

    def figures(self, name: str, figures: Mapping[str, Any]) -> None:
        """As `row`, for names that are no identifiers."""
        plain = {figure: _plain(value) for figure, value in figures.items()}
        goals = {goal.figure: goal for goal in self._stage.goals if goal.row == name and goal.figure in plain}
        told = [f"{figure} {_shown(value)}{self._told(goals.get(figure), value)}" for figure, value in plain.items()]
        judged = {} if self.dry else {figure: goal.met(figures[figure]) for figure, goal in goals.items()}
        kept = {figure: {"goal": str(goal), "met": judged.get(figure)} for figure, goal in goals.items()}
        self._write(name, {"figures": plain} | ({"goals": kept} if kept else {}), ", ".join(told))

    def fault(self, name: str, reason: str) -> None:
        """Ours is wrong, or does not run: the stage goes on, and has failed."""
        self.faults += 1
        self._write(name, {"fault": reason}, f"FAULT: {reason}")

    def left_out(self, name: str, reason: str) -> None:
        """What cannot be measured here through no fault of ours: a peer that is wrong, a tool that is absent."""
        self._write(name, {"left_out": reason}, f"left out: {reason}")

    def _told(self, goal: Goal | None, value: Any) -> str:
        if goal is None:
            return ""
        judged = "dry run" if self.dry else "met" if goal.met(value) else "NOT met"
        return f" (goal {goal}: {judged})"

    def _write(self, name: str, content: dict[str, Any], told: str) -> None:
        line = json.dumps({"stage": self._stage.name, "row": name, **content}, ensure_ascii=False, allow_nan=False)
        with self._results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"  {name}: {told}", flush=True)


def _plain(value: Any) -> Any:
    """As JSON has it: infinite and undefined numbers as texts."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
