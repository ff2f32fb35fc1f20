"""What the host tells the gateway."""

from __future__ import annotations

from dataclasses import dataclass

from tav_opt.serving.log import LogFormat

DRAIN_SECONDS = 60
"""How long what is in flight may take when the server is asked to stop."""
KEEPALIVE_SECONDS = 60
"""After so long without a word a client is asked whether it is still there; an edit for nobody is cancelled."""
HEADER = "tav-opt-gateway"
"""Triton asks for it, and its key, before it does anything."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the gateway listens, and what stands behind it."""

    host: str
    grpc_port: int
    http_port: int
    metrics_port: int
    inner_port: int
    """Of plain HTTP on loopback, for the host's own probes."""
    triton_port: int
    triton_metrics_port: int
    key: str
    """Of the header that Triton asks for."""
    log_format: LogFormat = "text"
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
