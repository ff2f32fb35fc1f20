"""The process of one stage: `python benchmarks/gpu/one_stage.py NAME WHERE RESULTS [--dry]`, which run.py starts."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

import torch
from common import machine
from report import Report
from stages import STAGES, Stage

from tav_opt.config import InputError, first_line


def main(name: str, where: str, results: str, *flags: str) -> int:
    """Runs the stage; 1 where it raised, or found a fault."""
    known = {stage.name: stage for stage in STAGES}
    stage = known.get(name) or Stage(name=name, where=where, seconds=0, says="")
    report = Report(stage, Path(results), dry="--dry" in flags)
    module, function = where.split(":")
    try:
        if not report.dry and not torch.cuda.is_available():
            raise InputError("PyTorch sees no CUDA GPU here: --dry runs without one")
        report.row("machine", dry=report.dry, **machine())
        getattr(importlib.import_module(module), function)(report)
    except Exception as error:  # whatever ends a stage is said, and ends no other
        traceback.print_exc()
        report.fault("the stage itself", f"{type(error).__name__}: {first_line(error)}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
