"""What operators see of the real server: traces, JSON logs, options passed on, a dashboard and alerts that are true."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import supervised
from served import until
from supervised import CLIP, SHORT

from tav_opt import cli
from tav_opt.client import Client, InputError
from tav_opt.cli.serve import told
from tav_opt.serving import log, tracing

collector = pytest.importorskip("collector", reason="opentelemetry is not installed")
ROOT = Path(__file__).parents[1]
PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


@pytest.fixture(scope="module")
def run(golden, tmp_path_factory):
    """The real server with all of it: traced, its log in JSON, an option of Triton's own."""
    repository = supervised.repository(golden, tmp_path_factory.getbasetemp())
    with (
        collector.collecting() as collected,
        Observed(repository, f"otlp://127.0.0.1:{collected.port}") as serving,
    ):
        yield serving, collected
