"""The real server on the tests' one exported clip, in this process or as `tav-opt serve`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from exported import export_once

from tav_opt.config import EditConfig, InputError
from tav_opt.contract import STREAM_MODEL
from tav_opt.serving.host import tritonserver
from tav_opt.serving.host.serve_config import ServeConfig

CLIP = "first"
SHORT = EditConfig(prompts=("a panda is skiing",), steps=2, guidance_scale=7.5)


def repository(golden: Path, temporary: Path) -> Path:
    """A model repository with the clip `first`; skips where no server is installed."""
    try:
        tritonserver.find_tritonserver()
    except InputError as lacking:
        pytest.skip(str(lacking))
    return Path(shutil.copytree(export_once(golden, temporary).repository, temporary / "served", dirs_exist_ok=True))


def on_free_ports(folder: Path, **settings) -> ServeConfig:
    return ServeConfig(repository=folder, grpc_port=0, http_port=0, metrics_port=0, **settings)


def workers(process: psutil.Process | subprocess.Popen) -> list[psutil.Process]:
    """The Python backend's processes below a process, the streaming model's first."""
    below = {p: " ".join(p.cmdline()) for p in psutil.Process(process.pid).children(recursive=True)}
    found = [p for p, command in below.items() if "triton_python_backend_stub" in command]
    return sorted(found, key=lambda p: STREAM_MODEL not in below[p])


def triton(process: subprocess.Popen) -> psutil.Process:
    """The tritonserver that `tav-opt serve` runs."""
    (found,) = (child for child in psutil.Process(process.pid).children() if child.name() == "tritonserver")
    return found


class Serving:
    """`tav-opt serve` as a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        hears = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # whatever runs the tests ignores
        code = f"{hears}; import sys; from tav_opt.cli import main; sys.exit(main(sys.argv[1:]))"
        ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "--repository", folder, *ports, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors: list[str] = []
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()
        self.urls = self.ready()

    def ready(self) -> dict[str, str]:
        """Waits until it says that it is ready, and returns its addresses."""
        assert self.process.stdout is not None
        shown = [self.process.stdout.readline().split() for _ in range(4)]
        assert [line[:1] for line in shown] == [["ready"], ["gRPC"], ["HTTP"], ["metrics"]], self.errors
        return dict(shown[1:])

    def ended(self) -> int:
        """Waits for its end → exit status."""
        status = self.process.wait(90)
        self._reader.join(10)
        return status

    def restarts(self) -> int:
        return len(re.findall(r"tav-opt serve: restart \d", "".join(self.errors)))

    def _read(self, stream) -> None:
        for line in stream:
            self.errors.append(line)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Serving]:
    """Nothing is left of it afterwards, whatever the test did."""
    run = Serving(folder, *options)
    below = psutil.Process(run.process.pid).children(recursive=True)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            below += psutil.Process(run.process.pid).children(recursive=True)
            for _ in range(2):  # the second ends it at once, and leaves no shared memory as SIGKILL would
                run.process.terminate()
                time.sleep(0.2)
            try:
                run.process.wait(30)
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()
        for process in below:
            if process.is_running():
                process.kill()
