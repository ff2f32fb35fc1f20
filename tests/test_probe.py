"""What the probe makes of every way a server can answer, scripted; against Triton: test_supervision."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tav_opt.config import InputError
from tav_opt.serving.host import probe as probing
from tav_opt.serving.host.probe import probe

NOT_HEALTHY = "Stub process 'tune_a_video_stream_0_0' is not healthy."


def page(*, waiting: int = 0, failed: int = 0) -> str:
    """Metrics as Triton writes them; another model's do not count."""
    lines = ["# TYPE nv_inference_pending_request_count gauge"]
    for model, n, m in (("other", 7, 7), ("tune_a_video_stream", waiting, failed)):
        of = f'model="{model}"'
        lines.append(f'nv_inference_request_failure{{{of},reason="BACKEND",version="1"}} {m}')
        lines.append(f'nv_inference_request_failure{{{of},reason="OTHER",version="1"}} 5')
        lines.append(f'nv_inference_pending_request_count{{{of},version="1"}} {n}')
    return "\n".join(lines) + "\n"


class Scripted(ThreadingHTTPServer):
    """Serves metrics pages, the last one over and over, and answers edits with a status and a text."""

    def __init__(self, pages: list[str], status: int = 200, text: str = "", hang: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.status, self.text, self.hang = pages, status, text, hang
        self.asked: list[dict] = []
        self.done = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self):
        pages = self.server.pages
        self._send(200, pages.pop(0) if len(pages) > 1 else pages[0])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, **body})
        if self.server.hang:
            self.server.done.wait(30)
        self._send(self.server.status, self.server.text.replace("CLIP", body["clip"]))

    def _send(self, status: int, text: str) -> None:
        with suppress(BrokenPipeError):  # who hung up hears nothing
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def ask(monkeypatch):
    """Probes a scripted server → what was found, and the requests that reached it."""
    monkeypatch.setattr(probing.time, "sleep", lambda _seconds: None)
    servers = []

    def asked(*args, timeout_s: float = 5.0, http_url: str | None = None, metrics_url: str | None = None, **kwargs):
        server = Scripted(*args, **kwargs)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        return probe(http_url or url, metrics_url or f"{url}/metrics", timeout_s=timeout_s), server.asked

    yield asked
    for server in servers:
        server.done.set()
        server.shutdown()
        server.server_close()


def test_a_worker_that_quotes_the_name_is_alive(ask):
    health, asked = ask([page()], 400, """data: {"error":"clip 'CLIP' is unknown; exported are: first"}\n\n""")
    assert health.state == "alive"
    assert asked[0]["path"] == "/v2/models/tune_a_video_stream/generate_stream"
    assert asked[0]["id"] == "tav-opt-probe"


def test_no_two_probes_ask_for_the_same_clip(ask):
    clips = {ask([page()], 400, "clip 'CLIP' is unknown")[1][0]["clip"] for _ in range(3)}
    assert len(clips) == 3, "an answer could be an old one"


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (400, f'data: {{"error":"{NOT_HEALTHY}"}}\n\n', "is not healthy"),
        (404, """{"error":"Request for unknown model: 'tune_a_video_stream' is not found"}""", "unknown model"),
        (503, """{"error":"Request for unknown model: it is not ready"}""", "not ready"),
        (200, "<html>hello</html>", "unexpected answer: '<html>"),
        (200, "", "unexpected answer"),
    ],
)
def test_any_other_answer_is_a_dead_one(ask, status, text, words):
    health, _ = ask([page()], status, text)
    assert health.state == "dead"
    assert words in health.reason


def test_a_full_queue_is_a_busy_worker(ask):
    health, _ = ask([page()], 503, '{"error":"[request id: tav-opt-probe] Exceeds maximum queue size"}')
    assert health.state == "busy"


def test_no_answer_in_time_is_a_busy_worker(ask):
    health, _ = ask([page()], hang=True, timeout_s=0.3)
    assert health.state == "busy"


def test_while_requests_wait_no_other_is_added(ask):
    health, asked = ask([page(waiting=3, failed=2)], 400, NOT_HEALTHY)
    assert (health.state, asked) == ("busy", [])


def test_waiting_requests_that_fail_one_by_one_are_a_dead_worker(ask):
    health, asked = ask([page(waiting=3, failed=2), page(waiting=1, failed=4)], 400, NOT_HEALTHY)
    assert (health.state, asked) == ("dead", [])
    assert "2 waiting requests failed" in health.reason


def test_a_port_that_speaks_no_http_is_no_living_server(ask):
    """Such as the one of gRPC, which begins with its own words."""

    def speak() -> None:
        connection, _ = s.accept()
        with connection, connection.makefile("rb") as asked:
            while b"}" not in asked.read1():  # whole, or closing would reset the connection
                pass
            connection.sendall(b"\0\0\x18\4\0\0")

    with socket.create_server(("127.0.0.1", 0)) as s:
        threading.Thread(target=speak, daemon=True).start()
        health, _ = ask([page()], http_url=f"http://127.0.0.1:{s.getsockname()[1]}")
    assert health.state == "dead"
    assert "is not to be read: BadStatusLine" in health.reason


@pytest.mark.parametrize("url", ["localhost:8000", "", "8000", "file:///etc/passwd"])
def test_an_address_is_a_url(url):
    with pytest.raises(InputError, match=r"is no URL, e\.g\. http://localhost:8000"):
        probe(url, "http://127.0.0.1:9/metrics")


@pytest.mark.parametrize("mute", ["http", "metrics"])
def test_where_nothing_answers_nothing_lives(ask, mute):
    health, asked = ask([page()], **{f"{mute}_url": "http://127.0.0.1:9/mute"})
    assert (health.state, asked) == ("dead", [])
    assert "nothing answers at http://127.0.0.1:9/mute: " in health.reason
