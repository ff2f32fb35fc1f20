"""The tests that need a GPU, by pytest: a row a test as it ends."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from report import Report

TESTS = Path(__file__).parents[2] / "tests"
WORKERS = 8
"""Kernels are compiled as they are first launched, on as many cores."""


class Rows:
    """A pytest plugin that tells a report what became of each test."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of set-up, call and tear-down: what passed is said of the call alone."""
        if report.failed:
            self._report.fault(report.nodeid, f"{report.when} failed: {_reason(report)}")
        elif report.skipped:
            self._report.left_out(report.nodeid, _reason(report))
        elif report.when == "call":
            self.passed += 1
            self._report.row(report.nodeid, seconds=report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read."""
        if report.failed:
            self._report.fault(report.nodeid or "collection", _reason(report))


def kernel_tests(report: Report) -> None:
    """All of tests/test_*_gpu.py; that none passed on a GPU is a fault."""
    rows, files = Rows(report), sorted(map(str, TESTS.glob("test_*_gpu.py")))
    parallel = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") and not report.dry else []
    status = pytest.main(
        ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *parallel, *files], plugins=[rows]
    )
    report.row("all", passed=rows.passed, files=len(files))
    if not report.dry and (status not in (0, 1) or not rows.passed):
        report.fault("all", f"{rows.passed} tests passed, and pytest ended with status {int(status)}")


def _reason(report: Any) -> str:
    """What pytest says in one line: that of the error, else the last."""
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    lines = said.strip().splitlines() or ["nothing was said"]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (errors or lines[-1:])[0][:300]
