"""benchmarks/load.py, small, against the real server: that it measures, not what."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import supervised
from supervised import CLIP

from tav_opt.serving.host.server import Server

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def repository(golden, tmp_path_factory):
    return supervised.repository(golden, tmp_path_factory.getbasetemp())


def load(out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What it wrote, and what it printed."""
    small = ["--steps", "2", "--clients", "2", "--seconds", "2", "--rate", "4", "--out", str(out)]
    command = [sys.executable, "benchmarks/load.py", *small, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def assert_loaded(found: dict[str, Any]) -> None:
    closed, opened = found["loads"].values()
    assert closed["requests"].keys() == {"OK"} and closed["edits a second"] > 0
    assert 0.5 < closed["fairness (Jain)"] <= 1
    assert opened["requests"]["OK"] > 0 and opened["overtaken"] == 0
    assert closed["first progress"]["p50"] < closed["latency"]["p50"]


@pytest.mark.full
def test_a_running_server_is_loaded(repository, tmp_path):
    with Server(supervised.on_free_ports(repository)) as server:
        found, shown = load(tmp_path / "load.json", "--url", server.grpc_url, "--clip", CLIP)
        assert server.process.poll() is None
    assert_loaded(found)
    assert found["against this process"] == [] and "edits a second" in shown


def test_a_server_of_its_own_is_compared_with_this_process_first(repository, tmp_path):
    found, shown = load(tmp_path / "load.json", "--preset", str(repository), "--pairs", "2")
    assert_loaded(found)
    figures = {figure["name"]: figure["value"] for figure in found["against this process"]}
    assert figures["second edit's inversion"] == 0
    assert figures["an edit in this process"] > 0
    assert {"the gateway's way", "the gateway's share of an edit"} < figures.keys()
    assert len(figures) == 10 and all(name in shown for name in figures)


def test_a_running_servers_clip_is_asked_for():
    done = subprocess.run(
        [sys.executable, "benchmarks/load.py", "--url", "x:1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "--url needs --clip" in done.stderr and done.stderr.count("\n") == 1
