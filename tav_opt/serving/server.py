"""Starts NVIDIA Triton Inference Server on the exported clips, and stops it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType

from tav_opt.config import InputError
from tav_opt.contract import STREAM_MODEL
from tav_opt.serving.tritonserver import Launch, compose, find_tritonserver

READY_SECONDS = 120.0
"""A server that is not ready by then is given up."""
DRAIN_SECONDS = 60
"""How long the edits in flight may take when the server is asked to stop."""
UNLOAD_SECONDS = 10.0
"""How long unloading the model may take after the last edit. After some malformed requests Triton 2.51 never does."""

_NOISE = re.compile("CudaDriverHelper has not been|HandleCancellation called even")
"""Errors that Triton logs though nothing is wrong: no GPU; an error sent on a stream."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where the server listens, and on what."""

    repository: Path = Path("serving/model_repository")
    """Model repository that the clips were exported to."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    grpc_port: int = 8001
    """0 takes a free one; so with the other ports."""
    http_port: int = 8000
    metrics_port: int = 8002
    tritonserver: Path | None = None
    """The program; without it, the one in $PATH, else the one in the nvidia-pytriton wheel."""


class ServerDied(RuntimeError):
    """The server ended unasked; the message is one line with its reason."""


class Server:
    """A server, started and ready; stopped at the end of the block that it is the context manager of.

    Raises InputError for an absent repository or tritonserver and for ports that are taken, and ServerDied when it
    does not come up.
    """

    def __init__(self, config: ServeConfig) -> None:
        if not (config.repository / STREAM_MODEL / "config.pbtxt").is_file():
            raise InputError(f"{config.repository} is not a model repository: it has no {STREAM_MODEL}/config.pbtxt")
        self.config = _with_ports(config)
        """With the ports that were taken."""
        self.log: deque[str] = deque(maxlen=500)
        """The last lines that the server and its worker logged."""
        self._echo = False
        self._drained = False
        self._idle_since: float | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="tav-opt-serve-")
        try:
            launch = compose(find_tritonserver(config.tritonserver), Path(self._folder.name))
            self.process = _spawn(launch, _options(self.config))
        except BaseException:
            self._folder.cleanup()
            raise
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            self._folder.cleanup()
            raise

    @property
    def grpc_url(self) -> str:
        """What the client takes: host:port."""
        return f"{_reachable(self.config.host)}:{self.config.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://{_reachable(self.config.host)}:{self.config.http_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{_reachable(self.config.host)}:{self.config.metrics_port}/metrics"

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerDied(f"tritonserver did not start: {self.reason()}")
            try:
                with urllib.request.urlopen(f"{self.http_url}/v2/health/ready", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise ServerDied(f"tritonserver was not ready within {READY_SECONDS:.0f} s")

    def echo(self) -> None:
        """From now on the worker's log, and the server's warnings and errors, go to stderr."""
        self._echo = True

    def wait(self) -> None:
        """Returns when the server has ended as asked; raises ServerDied when it ended otherwise."""
        if self.process.wait() != 0 and not self._drained:
            raise ServerDied(f"tritonserver died: {self.reason()}")

    def reason(self) -> str:
        """Why the server ended, in one line, from its log and its exit status."""
        self._reader.join(timeout=5)
        code = self.process.poll()
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        errors = [line for line in self.log if re.match(r"E\d{4} |error: ", line)]
        if not errors:
            return f"exit status {code}"
        cause = next((line for line in errors if "failed to load" in line), errors[0])
        text = cause.split('] "', 1)[-1].strip().strip('"')
        return text.split("\\n", 1)[0]

    def stop(self) -> None:
        """Lets the edits in flight end, then ends the server; kills it when that takes longer than DRAIN_SECONDS."""
        if self.process.poll() is None:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(DRAIN_SECONDS + 10)
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """Ends at once what is left of the server and its workers, which outlive a server that died."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _unload(self) -> None:
        # Triton counts a streamed edit as ended while the worker still works on it: only the worker knows.
        asked = time.monotonic()
        while self.process.poll() is None and not self._drained:
            idle = self._idle_since
            if idle is not None and time.monotonic() - max(idle, asked) > UNLOAD_SECONDS:
                self._drained = True
                self.kill()
            time.sleep(0.1)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if _NOISE.search(line):
                continue
            self.log.append(line)
            if " worker.py:" in line:
                self._idle_since = None if line.endswith(' begins"\n') else time.monotonic()
            elif "All models are stopped, unloading models" in line:
                threading.Thread(target=self._unload, daemon=True).start()
            if self._echo and (line[:1] != "I" or " worker.py:" in line):  # Triton itself is talkative
                sys.stderr.write(line)


def _spawn(launch: Launch, options: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launch.command, *options],
        env=launch.environment,
        cwd=launch.cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches us alone: we pass on what the server shall get
    )


def _options(config: ServeConfig) -> list[str]:
    return [
        f"--model-repository={config.repository.resolve()}",
        *(f"--{kind}-address={config.host}" for kind in ("grpc", "http", "metrics")),
        f"--grpc-port={config.grpc_port}",
        f"--http-port={config.http_port}",
        f"--metrics-port={config.metrics_port}",
        f"--exit-timeout-secs={DRAIN_SECONDS}",
        "--disable-auto-complete-config",  # the configuration is complete; completing it would load the model twice
        "--allow-gpu-metrics=false",
    ]


def _with_ports(config: ServeConfig) -> ServeConfig:
    """The configuration with free ports for 0; raises InputError naming a port that is taken."""
    names = ("grpc_port", "http_port", "metrics_port")
    held = []
    try:
        for name in names:
            held.append(_bound(config.host, getattr(config, name), name.replace("_", " ")))
        return replace(config, **{name: s.getsockname()[1] for name, s in zip(names, held, strict=True)})
    finally:
        for s in held:
            s.close()


def _bound(host: str, port: int, name: str) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputError(f"{name} {port} is not within 0…65535")
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: ports in TIME_WAIT are free
    try:
        s.bind((host, port))
        s.listen()
    except OSError as error:
        s.close()
        if isinstance(error, socket.gaierror):
            raise InputError(f"host {host!r} is not an address of this machine") from None
        raise InputError(f"{name} {port} on {host} cannot be taken: {error.strerror}; choose another, or 0") from None
    return s


def _reachable(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host


def serve(config: ServeConfig) -> int:
    """Runs the server until it is told to stop (SIGTERM or Ctrl-C, which let the edits in flight end) → exit status.

    A second signal ends it at once. When the server dies, its reason goes to stderr and the status is 1.
    """
    began = time.monotonic()
    with _Signals() as signals:
        try:
            server = Server(config)
        except ServerDied as error:
            print(f"tav-opt serve: {error}", file=sys.stderr)
            return 1
        with server:
            print(f"ready after {time.monotonic() - began:.1f} s; Ctrl-C stops")
            print(f"gRPC     {server.grpc_url}\nHTTP     {server.http_url}\nmetrics  {server.metrics_url}", flush=True)
            server.echo()
            signals.pass_on_to(server)
            try:
                server.wait()
            except ServerDied as error:
                print(f"tav-opt serve: {error}", file=sys.stderr)
                return 1
    return 0


class _Signals:
    """SIGTERM and SIGINT interrupt until the server is ready; then the first drains it and the second kills it."""

    def __init__(self) -> None:
        self._server: Server | None = None
        self._asked = False

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on_to(self, server: Server) -> None:
        self._server = server

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._server is None:
            raise KeyboardInterrupt
        if self._asked:
            self._server.kill()
        else:
            self._server.process.terminate()
        self._asked = True


if __name__ == "__main__":
    try:
        print(find_tritonserver().binary)
    except InputError as lacking:
        sys.exit(str(lacking))
