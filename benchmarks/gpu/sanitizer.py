"""compute-sanitizer over one launch of each kernel, which is this file run as a program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch
from peers import inputs
from report import Report
from smoke import GROUPS, SMALL, small_norm

from tav_opt.kernels.group_norm import group_norm
from tav_opt.kernels.sparse_causal import sparse_causal_attention
from tav_opt.kernels.temporal import temporal_attention

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
    """One launch of each kernel."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        for attention in (sparse_causal_attention, temporal_attention):
            out = attention(*inputs(SMALL, device, torch.float16), SMALL.frames, SMALL.heads)
            assert out.isfinite().all()
    norm = [x.requires_grad_() for x in small_norm(device)]
    out = group_norm(*norm, SMALL.frames, GROUPS, 1e-5, silu=True)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), norm))
    print("launched")


if __name__ == "__main__":
    launch_all()
