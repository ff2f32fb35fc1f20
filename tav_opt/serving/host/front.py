"""The gateway's process, and Triton's place behind it: ports of its own on loopback, and a key that nobody is told."""

from __future__ import annotations

import json
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass

from tav_opt.serving.gateway.settings import HEADER, Settings
from tav_opt.serving.host.serve_config import ServeConfig

PROTOCOLS = "health metadata inference statistics model-config model-repository shared-memory trace logging".split()
"""All that Triton can lock."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where Triton listens behind a gateway."""

    grpc_port: int
    metrics_port: int
    inner_port: int
    """Where the gateway speaks plain HTTP to the host."""
    key: str

    @classmethod
    def free(cls) -> Place:
        """Ports that are free now."""
        held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [one.getsockname()[1] for one in held]
        for one in held:
            one.close()
        return cls(grpc_port=ports[0], metrics_port=ports[1], inner_port=ports[2], key=secrets.token_hex(16))

    def options(self) -> list[str]:
        """Of tritonserver."""
        return [
            "--grpc-address=127.0.0.1",
            "--metrics-address=127.0.0.1",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            "--allow-http=false",
            f"--grpc-restricted-protocol={','.join(PROTOCOLS)}:{HEADER}={self.key}",
        ]


class Front:
    """The gateway, as the host starts it and ends it."""

    def __init__(self, settings: Settings, place: Place) -> None:
        self.place = place
        # Its settings go by standard input, which ends when this process does, however that happens.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tav_opt.serving.gateway"], stdin=subprocess.PIPE, start_new_session=True, text=True
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(settings)) + "\n")
        self.process.stdin.flush()

    @classmethod
    def of(cls, config: ServeConfig) -> Front | None:
        """A gateway for a server, started; None where Triton itself shall listen."""
        if config.direct:
            return None
        place = Place.free()
        tls = {name: getattr(config, name) for name in ("tls_certificate", "tls_key", "tls_client_ca")}
        settings = Settings(
            host=config.host,
            grpc_port=config.grpc_port,
            http_port=config.http_port,
            metrics_port=config.metrics_port,
            inner_port=place.inner_port,
            triton_port=place.grpc_port,
            triton_metrics_port=place.metrics_port,
            key=place.key,
            log_format=config.log_format,
            **{name: None if path is None else str(path) for name, path in tls.items()},
        )
        return cls(settings, place)

    def drain(self) -> None:
        """From now on it takes no request; what is in flight may end."""
        self.process.send_signal(signal.SIGTERM)

    def stop(self, timeout_s: float) -> None:
        """Lets it end, and ends it where that takes longer."""
        self.drain()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
