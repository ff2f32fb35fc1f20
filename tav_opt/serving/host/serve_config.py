"""What `tav-opt serve` is told, and whether it makes sense here."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Suppress

from tav_opt.config import Config, InputError, Within, WorkerConfig, check_numbers, with_absolute_paths
from tav_opt.serving import tracing
from tav_opt.serving.host import gpus
from tav_opt.serving.host.gpus import Gpus
from tav_opt.serving.log import LogFormat

Port = Annotated[int, Within(0, 65535)]

_OURS = frozenset(
    "id model-store model-repository model-control-mode load-model repository-poll-secs backend-directory "
    "cache-directory allow-http allow-grpc allow-metrics allow-sagemaker allow-vertex-ai "
    "http-address grpc-address metrics-address http-port grpc-port metrics-port reuse-http-port reuse-grpc-port "
    "http-restricted-api grpc-restricted-protocol grpc-use-ssl grpc-use-ssl-mutual grpc-server-cert grpc-server-key "
    "grpc-root-cert trace-file trace-level trace-rate trace-count trace-log-frequency trace-config log-file log-format "
    "exit-timeout-secs disable-auto-complete-config strict-model-config".split()
)
"""What of tritonserver's own options the host decides: where it listens, for whom, on what, and how it ends."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """Where the server listens, on what it works, and how. What follows `--` is given to tritonserver as it stands."""

    repository: Path = Path("serving/model_repository")
    """Model repository that the clips were exported to."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    grpc_port: Port = 8001
    """0 takes a free one; so with the other ports."""
    http_port: Port = 8000
    metrics_port: Port = 8002
    tls_certificate: Path | None = None
    """PEM chain that gRPC and HTTP show; with `tls_key`. Metrics stay plain."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """PEM authorities; only clients that show a certificate of theirs are served."""
    probe_seconds: Annotated[float, Within(0.1, 86_400)] = 5.0
    """Seconds between two probes of the running server."""
    restarts: Annotated[int, Within(0, 1000)] = 5
    """How often within ten minutes a server that died, or whose worker died, is started anew at once; then the pause
    before it doubles, up to a minute."""
    recycle_mib: Annotated[int, Within(0, 1 << 24)] = 0
    """What Triton and its workers may hold together; once it is more they are started anew, between two edits where
    there is such a moment within a minute. 0: no limit."""
    direct: bool = False
    """No gateway: Triton itself listens, for those who have a gateway of their own; strangers can stop it."""
    tritonserver: Path | None = None
    """The program; without it, the one in $PATH, else the one in the nvidia-pytriton wheel."""
    gpus: Gpus = ()
    """GPUs to edit on, by number: 0,1; default: every one, or the processor where there is none."""
    trace: str | None = None
    """Collector that every request is traced to, by Triton's spans and those of an edit's stages: otlp://HOST[:PORT],
    OTLP over HTTP, port 4318 by default."""
    log_format: LogFormat = "text"
    """json: one object a line on stderr, the announcement too."""
    tritonserver_args: Suppress[tuple[str, ...]] = ()
    """More options of tritonserver."""
    worker: OmitArgPrefixes[WorkerConfig] = field(default_factory=WorkerConfig)

    @property
    def http_host(self) -> str:
        """Where HTTP listens: Triton itself cannot encrypt it."""
        return "127.0.0.1" if self.direct and self.tls_certificate is not None else self.host


def checked(config: ServeConfig) -> ServeConfig:
    """The configuration with absolute paths, since the server runs in another folder, and free ports for 0.

    Raises InputError for settings out of range, half a TLS configuration, and ports that are taken.
    """
    check_numbers(config)
    config = with_absolute_paths(config)
    _check_tls(config)
    _check_passed_on(config.tritonserver_args)
    if config.trace is not None:
        tracing.endpoint(config.trace)
        tracing.check_installed()
    gpus.check(config.gpus)
    return _with_ports(config)


def _check_tls(config: ServeConfig) -> None:
    if (config.tls_certificate is None) != (config.tls_key is None):
        raise InputError("a TLS certificate and its key go together: give both, or neither")
    if config.tls_client_ca is not None and config.tls_certificate is None:
        raise InputError("a TLS client CA needs the server's own certificate and key too")
    for path in (config.tls_certificate, config.tls_key, config.tls_client_ca):
        if path is not None and not path.is_file():
            raise InputError(f"{path} does not exist or is no file")


def _check_passed_on(options: tuple[str, ...]) -> None:
    if options and not options[0].startswith("--"):
        raise InputError(f"after -- come tritonserver's options, as --log-verbose=1, not {options[0]!r}")
    for option in options:
        name = option.partition("=")[0]
        if name.startswith("--") and any(f"--{ours}".startswith(name) for ours in _OURS):  # it takes beginnings too
            raise InputError(f"{name} is not passed on: tav-opt serve sets it itself (tav-opt serve --help)")


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
