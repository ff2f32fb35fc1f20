"""compute-sanitizer over one launch of each kernel, forward and backward, which is this file run as a program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch
from report import Report
from smoke import launches

TOOLS = ("memcheck", "racecheck")
"""Reads and writes out of bounds; races in shared memory."""
FOUND = 99
"""The tool's exit status where it found something."""


def sanitizer(report: Report) -> None:
    """Each tool once; a dry run runs the program without them."""
    program = [sys.executable, __file__]
    if report.dry:
        done = subprocess.run(program, capture_output=True, text=True)
        _judge(report, "without a tool", done)
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        report.left_out("compute-sanitizer", "it is not installed on this machine")
        return
    # PyTorch's own cache of memory would hide reads past the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND), *program]
        _judge(report, name, subprocess.run(command, capture_output=True, text=True, env=environment))


def _judge(report: Report, name: str, done: subprocess.CompletedProcess[str]) -> None:
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    print(*said, sep="\n", file=sys.stderr)
    last = said[-1] if said else "it said nothing"
    if done.returncode == 0:
        report.row(name, said=last)
    elif done.returncode == FOUND:
        report.fault(name, last)
    else:
        report.fault(name, f"ended with status {done.returncode}: {last}")


def launch_all() -> None:
    """One launch of each kernel, forward and backward."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = 0
    for name, results, _ in launches(device):
        assert all(x.isfinite().all() for x in results), f"{name}: not finite"
        count += 1
    print(f"launched {count}")


if __name__ == "__main__":
    launch_all()
