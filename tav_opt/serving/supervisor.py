"""Keeps a server running: probes it, starts it anew when it or its worker has died, and stops it when asked to."""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from types import FrameType

from tav_opt.serving.probe import Health, probe
from tav_opt.serving.server import ServeConfig, Server, ServerDied

LOOK_SECONDS = 0.5
"""Between two looks at the processes, which cost next to nothing."""
PROBE_TIMEOUT_SECONDS = 4.0
"""With its worker dead Triton takes up to two seconds to say so."""
WINDOW_SECONDS = 600.0
"""Restarts longer ago do not count: what fails all the time cannot be mended by starting it again."""


def serve(config: ServeConfig) -> int:
    """Runs the server until it is told to stop (SIGTERM or Ctrl-C, which let the edits in flight end) → exit status.

    A second signal ends it at once. A server that dies, or whose worker does, is started anew on the same ports; its
    reason goes to stderr. The status is 1 when it does not start at first, and after `config.restarts` restarts within
    WINDOW_SECONDS.
    """
    restarts: deque[float] = deque()
    with _Signals() as signals:
        reason = None
        while True:
            began = time.monotonic()
            try:
                server = Server(config)
            except ServerDied as error:
                if reason is None:  # of its first start: another would not be better
                    print(f"tav-opt serve: {error}", file=sys.stderr)
                    return 1
                reason = str(error)
            else:
                config = server.config  # with its ports, which a restart keeps
                with server:
                    _announce(server, time.monotonic() - began)
                    reason = _watched(server, signals)
                if reason is None:
                    return 0
            print(f"tav-opt serve: {reason}", file=sys.stderr)
            if signals.asked or not _may_restart(restarts, config.restarts):
                return 1
            print(f"tav-opt serve: restart {len(restarts)} of {config.restarts}", file=sys.stderr, flush=True)


def _announce(server: Server, seconds: float) -> None:
    print(f"ready after {seconds:.1f} s; Ctrl-C stops")
    print(f"gRPC     {server.grpc_url}\nHTTP     {server.http_url}\nmetrics  {server.metrics_url}", flush=True)
    host = server.config.host
    if host not in ("127.0.0.1", "localhost") and server.config.tls_certificate is None:
        print(f"tav-opt serve: nothing that goes over {host} is encrypted (see --tls-certificate)", file=sys.stderr)


def _watched(server: Server, signals: _Signals) -> str | None:
    """Waits for the end of the server → None when it was asked for, else what is wrong; then nothing is left of it."""
    server.echo()
    signals.pass_on_to(server)
    try:
        return _fault(server, signals)
    except ServerDied as error:
        return str(error)
    finally:
        signals.pass_on_to(None)


def _fault(server: Server, signals: _Signals) -> str | None:
    """Kills the server when it is good for nothing and returns the reason; None when it ended as asked."""
    doubtful = False
    due = time.monotonic() + server.config.probe_seconds
    while not server.wait(LOOK_SECONDS):
        if signals.asked:  # it drains: whoever is in flight may end
            continue
        reason = "a worker process died" if server.lost_a_worker() else None
        if reason is None and time.monotonic() >= due:
            health = _probe(server)
            dead = health.state == "dead" and not signals.asked
            reason = f"the server edits no more: {health.reason}" if dead and doubtful else None
            doubtful = dead  # one bad answer may be a machine that is out of breath
            due = time.monotonic() + (0.0 if dead else server.config.probe_seconds)
        if reason is not None:
            server.kill()
            return reason
    return None


def _probe(server: Server) -> Health:
    return probe(server.http_url, server.metrics_url, timeout_s=PROBE_TIMEOUT_SECONDS)


def _may_restart(restarts: deque[float], most: int) -> bool:
    """Whether another restart is within the limit; it then counts."""
    now = time.monotonic()
    while restarts and now - restarts[0] > WINDOW_SECONDS:
        restarts.popleft()
    if len(restarts) >= most:
        return False
    restarts.append(now)
    return True


class _Signals:
    """SIGTERM and SIGINT interrupt until the server is ready; then the first drains it and the second kills it."""

    def __init__(self) -> None:
        self._server: Server | None = None
        self.asked = False
        """Whether a signal came that a running server was told of."""

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on_to(self, server: Server | None) -> None:
        self._server = server

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._server is None:
            raise KeyboardInterrupt
        if self.asked or self._server.lost_a_worker():
            self._server.kill()
        else:
            self._server.process.terminate()
        self.asked = True
