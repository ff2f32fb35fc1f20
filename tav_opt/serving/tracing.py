"""The stages of each edit as OpenTelemetry spans, below those that Triton makes of the request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tav_opt.config import InputError
from tav_opt.serving.report import Report

VARIABLE = "TAV_OPT_TRACE"
"""Of the worker: where its spans go."""
SERVICE = "tav-opt"
PORT = 4318
"""Of OTLP over HTTP."""


def endpoint(url: str) -> str:
    """Where OTLP over HTTP takes spans, of `otlp://HOST[:PORT]`; raises InputError for anything else."""
    wrong = InputError(f"trace {url!r} is not otlp://HOST or otlp://HOST:PORT (OTLP over HTTP, by default port {PORT})")
    try:
        parts = urlsplit(url)
        port = PORT if parts.port is None else parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme != "otlp" or not parts.hostname or parts.path.strip("/") or parts.query or parts.username:
        raise wrong
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"http://{host}:{port}/v1/traces"


def check_installed() -> None:
    """Raises InputError where OpenTelemetry is not."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    except ImportError:
        raise InputError("--trace needs OpenTelemetry: pip install 'tav-opt[trace]'") from None


def options(url: str) -> list[str]:
    """Of tritonserver: every request is traced, by its times."""
    return [
        "--trace-config=mode=opentelemetry",
        "--trace-config=level=TIMESTAMPS",
        "--trace-config=rate=1",
        f"--trace-config=opentelemetry,url={url}",
        f"--trace-config=opentelemetry,resource=service.name={SERVICE}",
    ]


class Spans:
    """Sends spans from a thread of its own; a collector that does not answer costs an edit nothing."""

    def __init__(self, exporter: Any) -> None:
        """`exporter`: one of OpenTelemetry's SDK."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("tav_opt.serving")

    @classmethod
    def open(cls) -> Spans | None:
        """None where nobody asked for traces."""
        if (url := os.environ.get(VARIABLE)) is None:
            return None
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return cls(OTLPSpanExporter(endpoint=url, timeout=5))

    def send(self, report: Report, status: str, began_ns: int, ended_ns: int, carrier: Mapping[str, str]) -> None:
        """An edit that ended, and its stages; `carrier`: the headers of the span that it stands below."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        above = TraceContextTextMapPropagator().extract(dict(carrier))
        told = {f"tav_opt.{name}": value for name, value in report.fields(prompts=False).items()}
        attributes = {"tav_opt.request_id": report.id, "tav_opt.status": status, **told}
        edit = self._tracer.start_span("edit", above, attributes=attributes, start_time=began_ns)
        if status not in ("OK", "CANCELLED"):
            edit.set_status(Status(StatusCode.ERROR, status))
        for name, start, end in report.stages:
            steps = {"tav_opt.steps": report.steps[of]} if (of := name) in report.steps else {}
            self._tracer.start_span(name, set_span_in_context(edit), attributes=steps, start_time=start).end(end)
        edit.end(ended_ns)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def carrier(request: Any) -> dict[str, str]:
    """The headers of Triton's span of a request; none where it is not traced."""
    context = request.trace().get_context()
    if not context:
        return {}
    found = json.loads(context)
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}
