"""`tav-opt probe`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from tav_opt.config import Within, check_numbers


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Ask a running server for what only a living worker answers."""

    metrics_url: str = "http://localhost:8002/metrics"
    """The gateway tells beside it, at /health, how the worker is."""
    http_url: str | None = None
    """Of a server without gateway (`serve --direct`, or a tritonserver by hand), e.g. http://localhost:8000."""
    timeout: Annotated[float, Within(0.01, 3600)] = 4.0
    """Seconds after which the worker counts as busy, where there is no gateway."""


def run(arguments: Sequence[str]) -> int:
    """Ask a running server for what only a living worker answers: status 0, or 1 when it edits no more."""
    args = tyro.cli(Probe, prog="tav-opt probe", args=arguments)
    check_numbers(args)
    from tav_opt.serving.host import probe

    if args.http_url is None:
        health = probe.told(args.metrics_url)
    else:
        health = probe.probe(args.http_url, args.metrics_url, timeout_s=args.timeout)
    print(f"{health.state}: {health.reason}")
    return int(health.state == "dead")
