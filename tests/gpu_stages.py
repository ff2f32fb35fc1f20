"""Stages that fail in the ways that stages fail: what test_gpu_run.py gives the driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = """
import pytest

def test_wrong():
    assert False, "by this much"

@pytest.mark.skip(reason="no card")
def test_absent():
    pass

def test_right():
    pass
"""


def fine(report: Any) -> None:
    report.row("first", ms=1.5)


def raises(report: Any) -> None:
    report.row("before", ms=1.0)
    raise RuntimeError("the compiler\nhas crashed")


def hangs(report: Any) -> None:
    report.row("before", ms=1.0)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.row("child", pid=child.pid)
    time.sleep(600)


def dies(report: Any) -> None:
    report.row("before", ms=1.0)
    with report._results.open("a") as file:
        file.write('{"stage": "dies", "row": "half')
    os.kill(os.getpid(), signal.SIGSEGV)


def tests_that_fail(report: Any) -> None:
    """That of pytest, over files of its own."""
    import kernel_tests

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_a_gpu.py").write_text("import nothing_here")
        (Path(folder) / "test_b_gpu.py").write_text(TESTS)
        kernel_tests.TESTS = Path(folder)
        kernel_tests.kernel_tests(report)


def at_fault(report: Any) -> None:
    report.left_out("a peer", "it is wrong")
    report.fault("ours", "it is wrong too")
    report.row("after", ms=2.0)
