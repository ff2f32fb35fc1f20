"""What operators see of the real server: traces, JSON logs, options passed on, a dashboard and alerts that are true."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import supervised
import yaml
from collector import Collector, Span, collecting
from exported import FRAMES, SIDE
from served import until
from supervised import CLIP, SHORT

from tav_opt import cli
from tav_opt.cli.serve import told
from tav_opt.client import Client, Retry
from tav_opt.config import InputError
from tav_opt.contract import UNARY_INPUTS
from tav_opt.serving import log, tracing
from tav_opt.serving.report import STAGES

HERE = Path(__file__).parent
ROOT = HERE.parent
CHART = ROOT / "serving" / "deploy" / "chart"
PARENT, ABOVE = "0123456789abcdef0123456789abcdef", "0123456789abcdef"
OPTIONS = ["--log-format", "json", "--", "--log-verbose=1", "--metrics-config", "summary_latencies=true"]


class Observed:
    """`tav-opt serve` as a process, and its log, line by line as JSON."""

    def __init__(self, repository: Path, *options: str) -> None:
        code = "import sys; from tav_opt.cli import main; sys.exit(main(sys.argv[1:]))"
        ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
        command = [sys.executable, "-c", code, "serve", "--repository", str(repository), *ports, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def urls(self) -> dict[str, str]:
        """Where it listens, once it is ready."""
        until(lambda: any("urls" in line for line in self.lines) or self.process.poll() is not None, 300)
        return next(line["urls"] for line in self.lines if "urls" in line)

    def ends(self, request_id: str) -> list[dict[str, Any]]:
        return [line for line in list(self.lines) if line.get("request_id") == request_id]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line))  # each is an object, or this thread ends and the tests wait in vain

    def stop(self) -> str:
        self.process.terminate()
        self.process.wait(90)
        self._reader.join(10)
        assert self.process.stdout is not None
        return self.process.stdout.read()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture(scope="module")
def serving(golden, tmp_path_factory, collector) -> Iterator[Observed]:
    """The real server, observed in every way, after an edit of each kind that counts something."""
    repository = supervised.repository(golden, tmp_path_factory.getbasetemp())
    running = Observed(repository, "--trace", f"otlp://127.0.0.1:{collector.port}", *OPTIONS)
    try:
        urls = running.urls()
        with Client(urls["gRPC"], retry=Retry(attempts=1)) as client:
            client.edit(CLIP, replace(SHORT, inversion_steps=3))
        headers = {"Content-Type": "application/json", "traceparent": f"00-{PARENT}-{ABOVE}-01"}
        for body in ({"clip": CLIP, "prompt": "a cat", "steps": 2, "id": "under"}, {"clip": "nobody", "prompt": "x"}):
            ask(f"{urls['HTTP']}/v2/models/tune_a_video_stream/generate_stream", body, headers)
        inputs = {"clip": CLIP, "prompt": "a dog", "steps": 2, "id": "unary"}
        ask(f"{urls['HTTP']}/v2/models/tune_a_video/generate", inputs, {"traceparent": "nonsense\t"})
        ask(f"{urls['HTTP']}/v2/models/tune_a_video/generate", {"clip": CLIP, "stepz": 1}, {})  # refused by the gateway
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()


def ask(url: str, body: dict[str, Any], headers: dict[str, str]) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            answer.read()
    except urllib.error.HTTPError as refusal:
        assert refusal.code < 500, refusal.read()


# Traces.


def edits(collector: Collector) -> dict[str, Span]:
    """Our span of each edit, by the request's id."""
    return {span.attributes["tav_opt.request_id"]: span for span in list(collector.spans) if span.name == "edit"}


def above(collector: Collector, span: Span) -> list[Span]:
    """The spans that one stands below, the nearest first."""
    by_id = {one.id: one for one in list(collector.spans)}
    found: list[Span] = []
    while (parent := by_id.get((found[-1] if found else span).parent)) is not None:
        found.append(parent)
    return found


def test_an_edits_stages_stand_below_tritons_spans_and_those_below_the_clients(serving, collector):
    until(lambda: "under" in edits(collector), 60)
    edit = edits(collector)["under"]
    until(lambda: (found := above(collector, edit)) and found[-1].parent == ABOVE, 60)  # Triton sends later
    assert edit.trace == PARENT
    stages = sorted((one for one in collector.spans if one.parent == edit.id), key=lambda one: one.begins)
    assert [one.name for one in stages] == ["open", "sample", "render"]
    assert all(edit.begins <= one.begins <= one.ends <= edit.ends for one in stages)
    assert stages[1].attributes["tav_opt.steps"] == 2
    told = edit.attributes
    assert told["tav_opt.status"] == "OK" and told["tav_opt.clip"] == CLIP and told["tav_opt.steps"] == 2
    assert not any("a cat" in str(span.attributes) for span in collector.spans), "prompts are nobody's business"
    assert {span.service for span in collector.spans} == {"tav-opt"}


def test_a_unary_request_is_one_trace_with_the_edit_that_it_asks_for(serving, collector):
    until(lambda: "unary" in edits(collector), 60)
    edit = edits(collector)["unary"]
    until(lambda: (found := above(collector, edit)) and found[-1].parent == "", 60)
    assert {"tune_a_video", "tune_a_video_stream"} <= {
        span.attributes.get("triton.model_name") for span in above(collector, edit)
    }


def test_what_fails_is_marked_and_probes_are_not_traced(serving, collector):
    until(lambda: len(edits(collector)) >= 4, 60)
    failed = [span for span in edits(collector).values() if span.attributes["tav_opt.status"] == "NOT_FOUND"]
    assert failed and all(span.failed for span in failed)
    assert not any("probe" in name for name in edits(collector))
    assert {span.name for span in collector.spans} >= {"edit", *STAGES} - {"decode"}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("otlp://collector", "http://collector:4318/v1/traces"),
        ("otlp://10.0.0.1:99", "http://10.0.0.1:99/v1/traces"),
        ("otlp://[::1]:99/", "http://[::1]:99/v1/traces"),
    ],
)
def test_where_traces_go(url, expected):
    assert tracing.endpoint(url) == expected


@pytest.mark.parametrize(
    "url", ["", "collector:4318", "http://x", "otlp://", "otlp://x:y", "otlp://x/v1", "otlp://x?y"]
)
def test_what_is_no_collector_is_one_line(url, tmp_path, capsys):
    assert cli.main(["serve", "--repository", str(tmp_path), f"--trace={url}"]) == 2
    error = capsys.readouterr().err
    assert f"trace {url!r} is not otlp://HOST" in error and error.count("\n") == 1


def test_traces_without_opentelemetry_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(InputError, match=r"pip install 'tav-opt\[trace\]'"):
        tracing.check_installed()


# The log.


def test_a_request_is_an_object_with_its_settings(serving):
    until(lambda: serving.ends("under"))
    (line,) = serving.ends("under")
    assert line["status"] == "OK" and line["clip"] == CLIP and line["steps"] == 2 and line["level"] == "info"
    assert line["seconds"] >= line["sample_seconds"] > 0 and line["logger"].startswith("worker.py:")
    assert line["message"].startswith("request 'under': OK in ") and "a cat" not in json.dumps(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_every_line_is_an_object_the_announcement_too(serving):
    ready = next(line for line in serving.lines if "urls" in line)
    assert ready["message"].startswith("ready after") and ready["logger"] == "tav-opt" and set(ready["urls"]) == {
        "gRPC", "HTTP", "metrics",
    }  # fmt: skip
    assert all({"time", "level", "logger", "message"} <= set(line) for line in serving.lines)
    assert any(line["message"].startswith("base ") for line in serving.lines)


@pytest.mark.parametrize(
    ("written", "level", "logger", "message"),
    [
        ('E1127 13:05:08.02 29 server.cc:25] "failed: \\"x\\"\\n"\n', "error", "server.cc:25", 'failed: "x"\n'),
        ("W1127 13:05:08.02 29 a.cc:2] plain\n", "warning", "a.cc:2", "plain"),
        ("Signal (15) received.\n", "info", "triton", "Signal (15) received."),
        ('I1127 13:05:08.02 29 a.cc:2] "[1, 2]"\n', "info", "a.cc:2", "[1, 2]"),
    ],
)
def test_tritons_lines_become_objects(written, level, logger, message):
    found = json.loads(log.line(written, "json"))
    assert (found["level"], found["logger"], found["message"]) == (level, logger, message)
    assert log.line(written, "text") == written


def test_the_usual_log_is_as_it_was(capsys):
    log.tell("restart 1", "text")
    assert capsys.readouterr().err == "tav-opt serve: restart 1\n"


# Options of tritonserver's own.


def test_options_behind_two_dashes_reach_tritonserver(serving, scrape):
    assert "nv_inference_request_summary_us" in scrape, "it was not asked for summaries"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--grpc-port=1"], "--grpc-port is not passed on"),
        (["--model-control-mode", "explicit"], "--model-control-mode is not passed on"),
        (["--http-restricted-api=x"], "--http-restricted-api is not passed on"),
        (["--trace-config=rate=9"], "--trace-config is not passed on"),
        (["--grpc-po=1"], "--grpc-po is not passed on"),
        (["--log-verbose=1", "--model-rep", "/x"], "--model-rep is not passed on"),
        (["--log-verbose=1", "--"], "-- is not passed on"),
        (["verbose"], "after -- come tritonserver's options"),
    ],
)
def test_what_the_host_decides_is_not_passed_on(options, words, tmp_path, capsys):
    assert cli.main(["serve", "--repository", str(tmp_path), "--", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_option_that_tritonserver_does_not_know_is_said_in_its_words(golden, tmp_path_factory, capsys):
    repository = supervised.repository(golden, tmp_path_factory.getbasetemp())
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    assert cli.main(["serve", "--repository", str(repository), *ports, "--", "--nonsense=3"]) == 1
    error = capsys.readouterr().err
    assert "did not start" in error and "--nonsense=3" in error and error.count("\n") == 1


def test_nothing_behind_two_dashes_is_nothing():
    assert told([]).tritonserver_args == told(["--instances", "2", "--"]).tritonserver_args == ()


# The dashboard and the alerts, against a real scrape.


@pytest.fixture(scope="module")
def scrape(serving) -> dict[str, list[dict[str, str]]]:
    """Labels of every series, by its name, as Prometheus reads the page."""
    with urllib.request.urlopen(serving.urls()["metrics"], timeout=60) as page:
        text = page.read().decode()
    found: dict[str, list[dict[str, str]]] = {}
    for name, labels in re.findall(r"^([a-z]\w*)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        found.setdefault(name, []).append(dict(re.findall(r'(\w+)="(.*?)"', labels)))
    return found


def panels() -> Iterator[dict[str, Any]]:
    for panel in json.loads((CHART / "files" / "dashboard.json").read_text())["panels"]:
        if panel["type"] != "row":
            yield panel


DASHBOARD = {panel["title"]: [one["expr"] for one in panel["targets"]] for panel in panels()}
RULES = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"][0]["rules"]
ALERTS = {rule["alert"]: [rule["expr"]] for rule in RULES}
OF_THE_CLUSTER = {"namespace", "pod"}
"""Labels that Prometheus adds to what it scrapes."""


def selectors(expression: Any) -> Iterator[promql_parser.VectorSelector]:
    """All series that an expression asks for."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if (below := getattr(expression, name, None)) is not None:
            yield from selectors(below)
    for below in getattr(expression, "args", None) or ():
        yield from selectors(below)


def parsed(expression: str) -> list[promql_parser.VectorSelector]:
    text = expression.replace("$__rate_interval", "5m").replace("$namespace", ".*").replace("$pod", ".*")
    found = list(selectors(promql_parser.parse(text)))
    assert found, f"no series is asked for: {text}"
    return found


@pytest.mark.parametrize("name", [*DASHBOARD, *ALERTS])
def test_every_series_that_is_asked_for_is_served(scrape, name):
    for expression in {**DASHBOARD, **ALERTS}[name]:
        for asked in parsed(expression):
            given = {m.name: m for m in asked.matchers.matchers if m.name not in OF_THE_CLUSTER}
            assert asked.name in scrape, f"{asked.name} is served by nobody"
            assert any(set(given) <= set(labels) for labels in scrape[asked.name]), f"{asked.name} lacks {set(given)}"
            for label, matcher in given.items():
                pattern = re.escape(matcher.value) if matcher.op == promql_parser.MatchOp.Equal else matcher.value
                assert any(re.fullmatch(pattern, labels.get(label, "")) for labels in scrape[asked.name]), matcher


def test_all_labels_that_curves_are_told_apart_by_are_served(scrape):
    everything = {label for series in scrape.values() for labels in series for label in labels} | OF_THE_CLUSTER
    for panel in panels():
        for target in panel["targets"]:
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= everything, panel["title"]


def test_a_metric_that_is_gone_would_be_found(scrape):
    (asked,) = parsed("sum(rate(tav_opt_stepz_total[5m]))")
    assert asked.name not in scrape


def test_panels_lie_beside_each_other():
    taken = set()
    for panel in json.loads((CHART / "files" / "dashboard.json").read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.parametrize("what", [["check", CHART / "files" / "alerts.yaml"], ["test", HERE / "alerts_test.yaml"]])
def test_the_alerts_fire_when_they_shall_by_prometheus_itself(what):
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool (Debian's package prometheus) is not installed")
    command = [promtool, what[0], "rules", str(what[1])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr


def test_each_alert_says_what_to_do():
    assert all({"summary", "description"} <= set(rule["annotations"]) and rule["labels"]["severity"] for rule in RULES)


# Load.


def test_the_data_for_perf_analyzer_is_what_the_unary_model_takes(serving):
    data = json.loads((ROOT / "examples" / "perf_analyzer.json").read_text())["data"]
    known = {tensor.name: tensor for tensor in UNARY_INPUTS}
    kinds = {"STRING": "BYTES"}
    for one in data:
        given = {**one, "clip": {"content": [CLIP], "shape": [1]}, "steps": {"content": [2], "shape": [1]}}
        inputs = [
            {
                "name": name,
                "datatype": kinds.get(known[name].dtype, known[name].dtype),
                "shape": tensor["shape"],
                "data": [bool(x) for x in tensor["content"]] if known[name].dtype == "BOOL" else tensor["content"],
            }
            for name, tensor in given.items()
        ]
        body = json.dumps({"inputs": inputs, "outputs": [{"name": "fps"}]}).encode()
        with urllib.request.urlopen(f"{serving.urls()['HTTP']}/v2/models/tune_a_video/infer", body, 300) as answer:
            assert json.loads(answer.read())["outputs"][0]["data"] == [8.0]


# At the end: what was passed on is still there when the server is asked to stop.


def test_it_edits_as_ever_and_ends_in_peace(serving):
    with Client(serving.urls()["gRPC"]) as client:
        assert client.edit(CLIP, SHORT).frames.shape == (1, FRAMES, SIDE, SIDE, 3)
    shown = serving.stop()
    assert serving.process.returncode == 0 and shown == ""
