"""A collector of traces: takes OTLP over HTTP, binary and JSON, as a real one does, and keeps the spans."""

from __future__ import annotations

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True, kw_only=True)
class Span:
    """Ids in hexadecimal, times in nanoseconds."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    begins: int
    ends: int
    failed: bool
    attributes: dict[str, Any]


class Collector(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taking)
        self.spans: list[Span] = []

    @property
    def port(self) -> int:
        return self.server_address[1]


class _Taking(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces", self.path
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.headers["Content-Type"].startswith("application/json"):
            found = json.loads(body)
        else:
            found = MessageToDict(ExportTraceServiceRequest.FromString(body))
            _make_hexadecimal(found)
        self.server.spans += _spans(found)
        self.send_response(200)
        self.send_header("Content-Type", self.headers["Content-Type"])
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}" if "json" in self.headers["Content-Type"] else b"\x0a\x00")

    def log_message(self, *_: object) -> None:
        pass


def _make_hexadecimal(value: Any) -> None:
    """Ids, as OTLP's JSON has them."""
    if isinstance(value, list):
        for one in value:
            _make_hexadecimal(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            if name in ("traceId", "spanId", "parentSpanId"):
                value[name] = base64.b64decode(one).hex()
            else:
                _make_hexadecimal(one)


def _spans(found: dict[str, Any]) -> Iterator[Span]:
    for resource in found["resourceSpans"]:
        service = _attributes(resource["resource"])["service.name"]
        for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
            yield Span(
                service=service,
                name=span["name"],
                trace=span["traceId"],
                id=span["spanId"],
                parent=span.get("parentSpanId", ""),
                begins=int(span["startTimeUnixNano"]),
                ends=int(span["endTimeUnixNano"]),
                failed=span.get("status", {}).get("code") in ("STATUS_CODE_ERROR", 2),
                attributes=_attributes(span),
            )


def _attributes(of: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for one in of.get("attributes", ()):
        ((kind, value),) = one["value"].items()
        found[one["key"]] = int(value) if kind == "intValue" else value
    return found


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as collector:
        serving = threading.Thread(target=collector.serve_forever, args=(0.05,), daemon=True)
        serving.start()
        yield collector
        collector.shutdown()
        serving.join()
