"""Keeps a server running: probes it, starts it anew when it or its worker has died, and stops it when asked to."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from types import FrameType

from tav_opt.config import InputError
from tav_opt.serving import log
from tav_opt.serving.host import leftovers
from tav_opt.serving.host.front import Front
from tav_opt.serving.host.probe import Health, probe
from tav_opt.serving.host.recycling import Growth
from tav_opt.serving.host.serve_config import ServeConfig, checked
from tav_opt.serving.host.server import Server, ServerDied, has_models

LOOK_SECONDS = 0.5
"""Between two looks at the processes, which cost next to nothing."""
ANSWER_SECONDS = 5.0
"""How long the gateway may take to hand over the last answers of a server that has ended as asked."""
WINDOW_SECONDS = 600.0
"""Restarts longer ago do not count."""
LONGEST_PAUSE_SECONDS = 60.0
"""Before a restart: a stranger who makes the server die can slow it, and never end it."""


def serve(config: ServeConfig) -> int:
    """Runs the server until it is told to stop (SIGTERM or Ctrl-C, which let the edits in flight end) → exit status.

    A second signal ends it at once. A server that dies, or whose worker does, is started anew behind the same gateway;
    its reason goes to stderr. It never gives up, whoever makes it die: after `config.restarts` restarts within
    WINDOW_SECONDS only the pause before the next one grows. The status is 1 when it does not start at first.
    """
    config = checked(config)
    for line in leftovers.sweep():
        log.tell(line, config.log_format)
    restarts: deque[float] = deque()
    fault: _Fault | None = None
    with _Signals() as signals, _Fronts(config) as fronts:
        while True:
            if fault is not None:
                _await(config, signals)
            began = time.monotonic()
            try:
                server = Server(config, fronts.living(), interrupted=lambda: signals.asked)
            except (ServerDied, InputError) as error:
                if fault is None:  # of its first start: another would not be better
                    return _told(error, config)
                fault = _Fault(str(error))
            else:
                with server:
                    _announce(server, time.monotonic() - began)
                    fault = _watched(server, signals)
                if fault is None:
                    return 0
            log.tell(fault.reason, config.log_format, "error")
            if signals.asked:
                return 1
            if fault.counts:
                _pause(restarts, config, signals)


def _await(config: ServeConfig, signals: _Signals) -> None:
    """Waits for a repository that was taken away, as a disk can be; raises KeyboardInterrupt where a signal comes."""
    if has_models(config.repository):
        return
    log.tell(f"{config.repository} is gone: waits until it is back", config.log_format)
    while not has_models(config.repository):
        if signals.asked:
            raise KeyboardInterrupt
        time.sleep(LOOK_SECONDS)


@dataclass(frozen=True)
class _Fault:
    """Why a server was ended."""

    reason: str
    counts: bool = True
    """As one of those that come again and again."""


class _Fronts:
    """The gateway, which outlives the servers behind it; another one where it has ended."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._front: Front | None = None

    def living(self) -> Front | None:
        if self._front is None or self._front.process.poll() is not None:
            self.__exit__()
            self._front = Front.of(self._config)
        return self._front

    def __enter__(self) -> _Fronts:
        return self

    def __exit__(self, *_: object) -> None:
        if self._front is not None:
            self._front.stop(ANSWER_SECONDS)


def _told(error: ServerDied | InputError, config: ServeConfig) -> int:
    if isinstance(error, InputError):
        raise error
    log.tell(str(error), config.log_format, "error")
    return 1


def _announce(server: Server, seconds: float) -> None:
    urls = {"gRPC": server.grpc_url, "HTTP": server.http_url, "metrics": server.metrics_url}
    tell = partial(log.tell, format=server.config.log_format)
    if server.config.log_format == "json":
        tell(f"ready after {seconds:.1f} s", level="info", urls=urls)
    else:
        print(
            f"ready after {seconds:.1f} s; Ctrl-C stops", *(f"{name:8} {url}" for name, url in urls.items()), sep="\n"
        )
        sys.stdout.flush()
    for base, engine in server.engines.items():
        tell(f"base {base}: {engine}", level="info")
    host = server.config.host
    if host not in ("127.0.0.1", "localhost") and server.config.tls_certificate is None:
        tell(f"nothing that goes over {host} is encrypted (see --tls-certificate)")


def _watched(server: Server, signals: _Signals) -> _Fault | None:
    """Waits for the end of the server → None when it was asked for, else what is wrong; then nothing is left of it."""
    server.echo()
    signals.pass_on_to(server)
    try:
        return _fault(server, signals)
    except ServerDied as error:
        return _Fault(str(error))
    finally:
        signals.pass_on_to(None)


def _fault(server: Server, signals: _Signals) -> _Fault | None:
    """Kills the server when it is good for nothing and returns the reason; None when it ended as asked."""
    growth = Growth(server)
    doubtful = False
    due = time.monotonic() + server.config.probe_seconds
    while not server.wait(LOOK_SECONDS):
        if signals.asked:  # it drains: whoever is in flight may end
            continue
        if growth.is_due():
            return _recycled(server, growth, signals)
        reason = "a worker process died" if server.lost_a_worker() else None
        if reason is None and time.monotonic() >= due:
            health = _probe(server)
            dead = health.state == "dead" and not signals.asked
            reason = f"the server edits no more: {health.reason}" if dead and doubtful else None
            doubtful = dead  # one bad answer may be a machine that is out of breath
            due = time.monotonic() + (0.0 if dead else server.config.probe_seconds)
        if reason is not None:
            server.kill()
            return _Fault(reason)
    return None


def _recycled(server: Server, growth: Growth, signals: _Signals) -> _Fault | None:
    """Lets the edits in flight end, and the server with them."""
    server.retire()
    while not server.wait(LOOK_SECONDS):
        pass
    return None if signals.asked else _Fault(str(growth), counts=False)


def _probe(server: Server) -> Health:
    return probe(server.inner_url, server.metrics_url, direct=True)


def _pause(restarts: deque[float], config: ServeConfig, signals: _Signals) -> None:
    """Notes a restart, and waits before it: not at all for the first ones, then twice as long each time.

    Raises KeyboardInterrupt where a signal comes meanwhile.
    """
    now = time.monotonic()
    while restarts and now - restarts[0] > WINDOW_SECONDS:
        restarts.popleft()
    restarts.append(now)
    beyond = len(restarts) - config.restarts
    seconds = 0.0 if beyond <= 0 else min(LONGEST_PAUSE_SECONDS, 2.0**beyond)
    later = f", in {seconds:.0f} s" if seconds else ""
    minutes = f"{WINDOW_SECONDS / 60:.0f} minutes"
    log.tell(f"restart {len(restarts)} within {minutes}{later}", config.log_format)
    while time.monotonic() - now < seconds:
        if signals.asked:
            raise KeyboardInterrupt
        time.sleep(0.1)


class _Signals:
    """SIGTERM, SIGHUP and SIGINT are noted, whatever the program is amid; a thread of its own does what they ask.

    The first drains the server, and the second kills it. Before it is ready one is enough, which Server looks for.
    """

    def __init__(self) -> None:
        self._server: Server | None = None
        self._count = 0
        self._noted: SimpleQueue[int] = SimpleQueue()  # the one kind of queue that a signal handler may put into
        self._acting = threading.Thread(target=self._act, daemon=True)

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self._count > 0

    def __enter__(self) -> _Signals:
        self._acting.start()
        self._before = {number: signal.signal(number, self._handle) for number in _heard()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._noted.put(0)
        self._acting.join()

    def pass_on_to(self, server: Server | None) -> None:
        """Whom signals mean from now on, one that has come already too."""
        self._server = server
        if server is not None and self.asked:
            server.drain()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._count += 1
        self._noted.put(self._count)

    def _act(self) -> None:
        while number := self._noted.get():
            if (server := self._server) is not None:
                (server.drain if number == 1 else server.kill)()


def _heard() -> list[signal.Signals]:
    """Those that stop a server; SIGHUP is none of them under nohup."""
    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGINT, *hang_up]
