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
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from types import TracebackType

import psutil

from tav_opt import command
from tav_opt.config import InputError
from tav_opt.contract import STREAM_MODEL
from tav_opt.loopback import urlopen
from tav_opt.repository.model_files import configure
from tav_opt.serving import log, tracing
from tav_opt.serving.gateway.settings import DRAIN_SECONDS, KEEPALIVE_SECONDS
from tav_opt.serving.host import guard, leftovers
from tav_opt.serving.host.front import Front
from tav_opt.serving.host.serve_config import ServeConfig, checked
from tav_opt.serving.host.tritonserver import Launch, compose, find_tritonserver
from tav_opt.serving.host_socket import VARIABLE, HostEnd

READY_SECONDS = 120.0
"""A server that is not ready by then is given up."""
UNLOAD_SECONDS = 10.0
"""How long unloading the model may take after the last edit. After some malformed requests Triton 2.51 never does."""

_NOISE = re.compile("CudaDriverHelper has not been|HandleCancellation called even")
"""Errors that Triton logs though nothing is wrong: no GPU; an error sent on a stream."""
_OURS = re.compile(r" (worker|unary)\.py:")


class ServerDied(RuntimeError):
    """The server ended unasked; the message is one line with its reason."""


class Server:
    """A server, started and ready; stopped at the end of the block that it is the context manager of.

    Raises InputError for an absent repository or tritonserver, for settings out of range and for ports that are taken,
    and ServerDied when it does not come up.
    """

    def __init__(
        self, config: ServeConfig, front: Front | None = None, *, interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        """`front` is a gateway that outlives this server; without it, and unless it is direct, it gets one.

        Raises KeyboardInterrupt where it is `interrupted` before it is ready.
        """
        if front is None:
            config = checked(config)
        if not has_models(config.repository):
            raise InputError(f"{config.repository} is not a model repository: it has no {STREAM_MODEL}/config.pbtxt")
        self.config = config
        """With the ports that were taken."""
        self.log: deque[str] = deque(maxlen=500)
        """The last lines that the server and its worker logged."""
        self._echo = False
        self._shows_all = any(option.startswith("--log-") for option in config.tritonserver_args)
        self._draining = threading.Lock()
        self._gave_up_draining = False
        self._channel = HostEnd()
        self._shared_memory = f"tav-opt-{secrets.token_hex(8)}-"
        self.front = front
        """The gateway, where there is one."""
        self._owns_front = front is None
        self._folder = tempfile.TemporaryDirectory(prefix=leftovers.PREFIX)
        try:
            folder = Path(self._folder.name)
            launch = compose(find_tritonserver(config.tritonserver), folder)
            configure(folder / "models", config.repository, config.worker, gpus=config.gpus)
            self.front = Front.of(config) if front is None else front
            options = _options(config, self.front, folder / "models", self._shared_memory)
            self.process = _spawn(launch, options, self._channel.workers, {**_told(config), "TMPDIR": str(folder)})
            leftovers.note(folder, self.process.pid, self._shared_memory)
            self._guard = guard.start(self.process.pid, self._shared_memory, folder)
        except BaseException:
            self._folder.cleanup()
            self._stop_front(0)
            raise
        finally:
            self._channel.workers.close()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        try:
            self._reader.start()
            self._wait_until_ready(interrupted)
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
        secured = self.front is not None and self.config.tls_certificate is not None
        return f"http{'s' if secured else ''}://{_reachable(self.config.http_host)}:{self.config.http_port}"

    @property
    def inner_url(self) -> str:
        """Plain HTTP for this process."""
        return self.http_url if self.front is None else f"http://127.0.0.1:{self.front.place.inner_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{_reachable(self.config.host)}:{self.config.metrics_port}/metrics"

    @property
    def engines(self) -> dict[str, str]:
        """What each base is served by, in words; those of no clip yet are absent."""
        return self._channel.engines

    def idle_seconds(self) -> float:
        """For how long no worker has had a request in hand."""
        return self._channel.idle_seconds()

    @property
    def has_edited(self) -> bool:
        """Whether it was ever asked for an edit."""
        return self._channel.has_taken

    def held_bytes(self) -> int:
        """Memory of tritonserver and its workers; what they share is counted once."""
        held = 0
        with suppress(psutil.NoSuchProcess):
            server = psutil.Process(self.process.pid)
            for process in (server, *server.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    held += process.memory_full_info().pss
        return held

    def _wait_until_ready(self, interrupted: Callable[[], bool]) -> None:
        deadline = time.monotonic() + READY_SECONDS
        for url in (f"{self.inner_url}/v2/health/ready", self.metrics_url):  # Triton opens the metrics' port last
            while not self._answers(url):
                if interrupted():
                    raise KeyboardInterrupt
                if time.monotonic() > deadline:
                    raise ServerDied(f"tritonserver was not ready within {READY_SECONDS:.0f} s: {url} does not answer")
                time.sleep(0.05)

    def _answers(self, url: str) -> bool:
        if self.process.poll() is not None:
            raise ServerDied(f"tritonserver did not start: {self.reason()}")
        if self.front is not None and self.front.process.poll() is not None:
            raise ServerDied(f"the gateway did not start: exit status {self.front.process.returncode}")
        try:
            with urlopen(url, 5, direct=True):  # whatever its host: the server is on this machine
                return True
        except (OSError, HTTPException):
            return False

    def lost_a_worker(self) -> bool:
        """Whether a worker process has ended, which Triton neither reports nor mends, or the gateway has."""
        front_ended = self.front is not None and not self._draining.locked() and self.front.process.poll() is not None
        return front_ended or self._live_workers() < self._workers

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
        if status != 0 and not self._gave_up_draining:
            raise ServerDied(f"tritonserver died: {self.reason()}")
        return True

    def reason(self) -> str:
        """Why the server ended, in one line, from its log and its exit status."""
        self._reader.join(timeout=5)
        code = self.process.poll()
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        errors = [line for line in self.log if re.match(r"E\d{4} |error: |.*: (unrecognized|ambiguous) option", line)]
        if not errors:
            return f"exit status {code}"
        cause = next((line for line in errors if "failed to load" in line), errors[0])
        text = cause.split('] "', 1)[-1].strip().strip('"')
        return text.split("\\n", 1)[0]

    def drain(self) -> None:
        """Asks the server to let the edits in flight end, and then to end; returns at once."""
        if self.lost_a_worker():
            self.kill()  # nothing is in flight, and Triton would wait for the dead
        elif self.process.poll() is None and self._draining.acquire(blocking=False):
            if self.front is not None:
                self.front.drain()
            self._end()

    def retire(self) -> None:
        """As `drain`, but the gateway stays, for another server."""
        if self.process.poll() is None:
            self._end()

    def _end(self) -> None:
        self.process.terminate()
        threading.Thread(target=self._unload, daemon=True).start()

    def stop(self) -> None:
        """Lets the edits in flight end, then ends the server; kills it when that takes longer than DRAIN_SECONDS."""
        self.drain()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(DRAIN_SECONDS + 10)
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """Ends at once what is left of the server and its workers, which outlive a server that died."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._stop_front(0.5)
        for region in guard.SHARED_MEMORY.glob(f"{self._shared_memory}*"):  # a killed server leaves them
            region.unlink(missing_ok=True)
        self._guard.kill()
        self._guard.communicate()

    def _stop_front(self, timeout_s: float) -> None:
        if self.front is not None and self._owns_front:
            self.front.stop(timeout_s)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _unload(self) -> None:
        # Triton counts a streamed edit as ended while the worker still works on it: only the worker knows.
        asked = time.monotonic()
        while self.process.poll() is None and not self._gave_up_draining:
            if min(self.idle_seconds(), time.monotonic() - asked) > UNLOAD_SECONDS:
                self._gave_up_draining = True
                self.kill()
            time.sleep(0.1)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if _NOISE.search(line):
                continue
            self.log.append(line)
            if self._echo and (self._shows_all or line[:1] != "I" or _OURS.search(line)):  # Triton itself is talkative
                log.write(log.line(line, self.config.log_format))


def has_models(repository: Path) -> bool:
    """Whether a folder is, and can be seen to be, a model repository."""
    return os.path.isfile(repository / STREAM_MODEL / "config.pbtxt")


def _told(config: ServeConfig) -> dict[str, str]:
    """What the worker is told by variables; where it writes, a folder of the server's own, is another."""
    found: dict[str, str] = {log.VARIABLE: config.log_format}
    return found if config.trace is None else {**found, tracing.VARIABLE: tracing.endpoint(config.trace)}


def _spawn(
    launch: Launch, options: list[str], channel: socket.socket, variables: dict[str, str]
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launch.command, *options],
        env={**launch.environment, VARIABLE: str(channel.fileno()), **variables},
        pass_fds=[channel.fileno()],
        cwd=launch.cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches us alone: we pass on what the server shall get
    )


def _options(config: ServeConfig, front: Front | None, models: Path, shared_memory: str) -> list[str]:
    return [
        f"--model-repository={models}",
        *(_open(config) if front is None else front.place.options()),
        f"--backend-config=python,shm-region-prefix-name={shared_memory}",
        f"--exit-timeout-secs={DRAIN_SECONDS}",
        "--disable-auto-complete-config",  # the configuration is complete; completing it would load the model twice
        "--allow-gpu-metrics=false",
        f"--grpc-keepalive-time={KEEPALIVE_SECONDS * 1000}",
        f"--grpc-http2-min-recv-ping-interval-without-data={KEEPALIVE_SECONDS * 500}",
        *(tracing.options(tracing.endpoint(config.trace)) if config.trace is not None else ()),
        *config.tritonserver_args,
    ]


def _open(config: ServeConfig) -> list[str]:
    """Where Triton itself listens."""
    return [
        f"--grpc-address={config.host}",
        f"--http-address={config.http_host}",
        f"--metrics-address={config.host}",
        f"--grpc-port={config.grpc_port}",
        f"--http-port={config.http_port}",
        f"--metrics-port={config.metrics_port}",
        *_secured(config),
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


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # Triton never collects its dead workers
    except psutil.NoSuchProcess:
        return False


def _reachable(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host  # nosec B104  # the other way round


if __name__ == "__main__":
    sys.exit(command.run("python -m tav_opt.serving.host.server", lambda _: print(find_tritonserver().binary)))
