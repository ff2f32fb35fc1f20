"""Starts NVIDIA Triton Inference Server on the exported clips, and stops it."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import psutil
from tyro.conf import OmitArgPrefixes

from tav_opt.config import InputError, WorkerConfig
from tav_opt.contract import STREAM_MODEL
from tav_opt.model_repository import configure
from tav_opt.serving.tritonserver import Launch, compose, find_tritonserver

READY_SECONDS = 120.0
"""A server that is not ready by then is given up."""
DRAIN_SECONDS = 60
"""How long the edits in flight may take when the server is asked to stop."""
KEEPALIVE_SECONDS = 60
"""After so long without a word a client is asked whether it is still there; an edit for nobody is cancelled."""
UNLOAD_SECONDS = 10.0
"""How long unloading the model may take after the last edit. After some malformed requests Triton 2.51 never does."""

_NOISE = re.compile("CudaDriverHelper has not been|HandleCancellation called even")
"""Errors that Triton logs though nothing is wrong: no GPU; an error sent on a stream."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where the server listens, on what it works, and how."""

    repository: Path = Path("serving/model_repository")
    """Model repository that the clips were exported to."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    grpc_port: int = 8001
    """0 takes a free one; so with the other ports."""
    http_port: int = 8000
    metrics_port: int = 8002
    tls_certificate: Path | None = None
    """PEM chain that gRPC shows; with `tls_key`. HTTP, which Triton cannot encrypt, then stays on this machine."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """PEM authorities; only clients that show a certificate of theirs are served."""
    probe_seconds: float = 5.0
    """Seconds between two probes of the running server."""
    restarts: int = 5
    """How often within ten minutes a server that died, or whose worker died, is started anew; 0: never."""
    tritonserver: Path | None = None
    """The program; without it, the one in $PATH, else the one in the nvidia-pytriton wheel."""
    worker: OmitArgPrefixes[WorkerConfig] = field(default_factory=WorkerConfig)

    @property
    def http_host(self) -> str:
        """Where HTTP listens."""
        return self.host if self.tls_certificate is None else "127.0.0.1"


class ServerDied(RuntimeError):
    """The server ended unasked; the message is one line with its reason."""


class Server:
    """A server, started and ready; stopped at the end of the block that it is the context manager of.

    Raises InputError for an absent repository or tritonserver, for settings out of range and for ports that are taken,
    and ServerDied when it does not come up.
    """

    def __init__(self, config: ServeConfig) -> None:
        if not (config.repository / STREAM_MODEL / "config.pbtxt").is_file():
            raise InputError(f"{config.repository} is not a model repository: it has no {STREAM_MODEL}/config.pbtxt")
        _check_tls(config)
        self.config = _with_ports(config)
        """With the ports that were taken."""
        self.log: deque[str] = deque(maxlen=500)
        """The last lines that the server and its worker logged."""
        self._echo = False
        self._drained = False
        self._idle_since: float | None = None
        self._shared_memory = f"tav-opt-{secrets.token_hex(8)}-"
        self._folder = tempfile.TemporaryDirectory(prefix="tav-opt-serve-")
        try:
            folder = Path(self._folder.name)
            launch = compose(find_tritonserver(config.tritonserver), folder)
            configure(folder / "models", config.repository, config.worker)
            self.process = _spawn(launch, _options(self.config, folder / "models", self._shared_memory))
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
        self._workers = self._live_workers()

    @property
    def grpc_url(self) -> str:
        """What the client takes: host:port."""
        return f"{_reachable(self.config.host)}:{self.config.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://{_reachable(self.config.http_host)}:{self.config.http_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{_reachable(self.config.host)}:{self.config.metrics_port}/metrics"

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        for url in (f"{self.http_url}/v2/health/ready", self.metrics_url):  # Triton opens the metrics' port last
            while not self._answers(url):
                if time.monotonic() > deadline:
                    raise ServerDied(f"tritonserver was not ready within {READY_SECONDS:.0f} s: {url} does not answer")
                time.sleep(0.05)

    def _answers(self, url: str) -> bool:
        if self.process.poll() is not None:
            raise ServerDied(f"tritonserver did not start: {self.reason()}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except OSError:
            return False

    def lost_a_worker(self) -> bool:
        """Whether a worker process has ended, which Triton neither reports nor mends."""
        return self._live_workers() < self._workers

    def _live_workers(self) -> int:
        try:
            workers = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return 0
        return sum(_lives(worker) for worker in workers)

    def echo(self) -> None:
        """From now on the worker's log, and the server's warnings and errors, go to stderr."""
        self._echo = True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the server has ended as asked within that time; raises ServerDied when it ended otherwise."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        if status != 0 and not self._drained:
            raise ServerDied(f"tritonserver died: {self.reason()}")
        return True

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
        if self.lost_a_worker():
            self.kill()  # nothing is in flight, and Triton would wait for the dead
        if self.process.poll() is None:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(DRAIN_SECONDS + 10)
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """Ends at once what is left of the server and its workers, which outlive a server that died."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in Path("/dev/shm").glob(f"{self._shared_memory}*"):  # a killed server leaves them
            region.unlink(missing_ok=True)

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


def _options(config: ServeConfig, models: Path, shared_memory: str) -> list[str]:
    return [
        f"--model-repository={models}",
        f"--grpc-address={config.host}",
        f"--http-address={config.http_host}",
        f"--metrics-address={config.host}",
        f"--grpc-port={config.grpc_port}",
        f"--http-port={config.http_port}",
        f"--metrics-port={config.metrics_port}",
        *_secured(config),
        f"--backend-config=python,shm-region-prefix-name={shared_memory}",
        f"--exit-timeout-secs={DRAIN_SECONDS}",
        "--disable-auto-complete-config",  # the configuration is complete; completing it would load the model twice
        "--allow-gpu-metrics=false",
        f"--grpc-keepalive-time={KEEPALIVE_SECONDS * 1000}",
        f"--grpc-http2-min-recv-ping-interval-without-data={KEEPALIVE_SECONDS * 500}",
    ]


def _secured(config: ServeConfig) -> list[str]:
    # A client that could register shared memory could name another program's. None of these serves an edit.
    administration = "model-repository,shared-memory,trace,logging"
    options = [
        f"--{kind}={administration}:administration={secrets.token_hex(16)}"
        for kind in ("http-restricted-api", "grpc-restricted-protocol")
    ]
    if config.tls_certificate is not None:
        options += [f"--grpc-server-cert={config.tls_certificate}", f"--grpc-server-key={config.tls_key}"]
        options.append(f"--grpc-use-ssl{'-mutual' if config.tls_client_ca else ''}=true")
    if config.tls_client_ca is not None:
        options.append(f"--grpc-root-cert={config.tls_client_ca}")
    return options


def _check_tls(config: ServeConfig) -> None:
    if (config.tls_certificate is None) != (config.tls_key is None):
        raise InputError("a TLS certificate and its key go together: give both, or neither")
    if config.tls_client_ca is not None and config.tls_certificate is None:
        raise InputError("a TLS client CA needs the server's own certificate and key too")
    for path in (config.tls_certificate, config.tls_key, config.tls_client_ca):
        if path is not None and not path.is_file():
            raise InputError(f"{path} does not exist or is no file")


def _with_ports(config: ServeConfig) -> ServeConfig:
    """The configuration with free ports for 0; raises InputError naming a port that is taken."""
    hosts = {"grpc_port": config.host, "http_port": config.http_host, "metrics_port": config.host}
    held = []
    try:
        for name, host in hosts.items():
            held.append(_bound(host, getattr(config, name), name.replace("_", " ")))
        return replace(config, **{name: s.getsockname()[1] for name, s in zip(hosts, held, strict=True)})
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


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # Triton never collects its dead workers
    except psutil.NoSuchProcess:
        return False


def _reachable(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host


if __name__ == "__main__":
    try:
        print(find_tritonserver().binary)
    except InputError as lacking:
        sys.exit(str(lacking))
