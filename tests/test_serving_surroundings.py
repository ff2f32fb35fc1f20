"""What stands around a request, against `tav-opt serve`: unknown names on every protocol, ids, and proxies.

The server and everything that asks it run with every proxy variable set to an address that answers nothing.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
import supervised
from served import Wire, raw, request
from supervised import CLIP, SHORT, Serving

from tav_opt import cli
from tav_opt.client import AsyncClient, Client, Retry
from tav_opt.config import InputError
from tav_opt.contract import STREAM_MODEL, UNARY_MODEL, to_tensors
from tav_opt.loopback import urlopen
from tav_opt.serving.host.probe import probe
from tav_opt.video import read

ROOT = Path(__file__).parents[1]
GOOD = raw(to_tensors(CLIP, SHORT))
JSON = {"clip": CLIP, "prompt": "a panda is skiing", "steps": 1}
SCHEMES = ("http", "https", "all", "grpc")


class FakeProxy:
    """Counts who asks it, and answers nothing."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.asked: list[bytes] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, suppress(OSError):
                    self.asked.append(connection.recv(100))

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture(scope="module")
def proxy() -> Iterator[FakeProxy]:
    """In the environment under every name there is, and excepted for nothing; onnxruntime's calls home would show."""
    fake = FakeProxy()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "ORT_DISABLE_TELEMETRY"):
            patch.delenv(name, raising=False)
        for scheme in SCHEMES:
            patch.setenv(f"{scheme}_proxy", fake.url)
            patch.setenv(f"{scheme.upper()}_PROXY", fake.url)
        yield fake
    fake.close()


@pytest.fixture(scope="module")
def run(golden, tmp_path_factory, proxy) -> Iterator[Serving]:
    folder = supervised.repository(golden, tmp_path_factory.getbasetemp())
    with supervised.serving(folder, "--probe-seconds", "0.5", "--restarts", "0") as running:
        yield running


@pytest.fixture
def wire(run) -> Iterator[Wire]:
    with Wire(run.urls["gRPC"]) as connected:
        yield connected


def logged(run: Serving, words: str) -> list[str]:
    """Lines of the log with these words, which come by a pipe behind the answers."""
    deadline = time.monotonic() + 10
    while not (found := [line for line in list(run.errors) if words in line]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def post(run: Serving, path: str, body: dict[str, Any] | bytes, **headers: str) -> tuple[int, str]:
    """Status and text of an answer over HTTP."""
    url = f"{run.urls['HTTP']}/v2/models/{path}"
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urlopen(asked, 60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except HTTPError as error:
        return error.code, error.read().decode(errors="replace")


# Unknown names.

generate = pytest.mark.parametrize("path", [f"{STREAM_MODEL}/generate_stream", f"{UNARY_MODEL}/generate"])


def refused(answer: tuple[int, str], words: str) -> None:
    """By the gateway, before a stream begins."""
    assert answer[0] == 400 and words in json.loads(answer[1])["error"]


@generate
@pytest.mark.parametrize("value", [50, 7.5, True, "fast", "", [1], {"a": 1}, None], ids=repr)
def test_an_unknown_name_is_refused_by_generate(run, path, value):
    refused(post(run, path, {**JSON, "stepz": value}), "parameter 'stepz' is unknown")


def test_what_only_the_stream_knows_is_refused_by_the_unary_model(run):
    for name in ("preview_interval", "caller"):
        status, text = post(run, f"{UNARY_MODEL}/generate", {**JSON, name: 1})
        assert status == 400 and f"'{name}' is unknown" in text


def test_a_setting_that_comes_as_a_parameter_is_refused(run, wire):
    for answer in (wire.ask(GOOD, parameters={"steps": 7}), wire.infer(UNARY_MODEL, GOOD, parameters={"steps": 7})):
        assert answer.status == "INVALID_ARGUMENT" and "parameter 'steps' is unknown" in answer.message
    status, text = post(run, f"{UNARY_MODEL}/infer", {**infer_json(), "parameters": {"steps": 7}})
    assert status == 400 and "parameter 'steps' is unknown" in text


def test_an_unknown_input_is_refused(run, wire):
    more = {**GOOD, "stepz": GOOD["steps"]}
    for answer in (wire.ask(more), wire.infer(UNARY_MODEL, more)):
        assert answer.status == "INVALID_ARGUMENT" and "stepz" in answer.message
    body = infer_json()
    body["inputs"].append({"name": "stepz", "datatype": "INT32", "shape": [1], "data": [3]})
    status, text = post(run, f"{UNARY_MODEL}/infer", body)
    assert status == 400 and "stepz" in text


def test_tritons_own_parameters_are_none_of_ours(run, wire):
    own = {"priority": 1, "timeout": 60_000_000, "sequence_id": 3}
    assert wire.ask(GOOD, parameters=own).status == "OK"
    assert wire.infer(UNARY_MODEL, GOOD, parameters=own).status == "OK"
    assert post(run, f"{UNARY_MODEL}/infer", {**infer_json(), "parameters": own}, steps="7")[0] == 200
    for path in (f"{STREAM_MODEL}/generate_stream", f"{UNARY_MODEL}/generate"):
        assert post(run, path, {**JSON, **own, "id": "x", "binary_data_output": False}, steps="7")[0] == 200


def test_what_triton_would_not_look_at_is_refused(run):
    """Beside the inputs, and in one of them."""
    refused(post(run, f"{UNARY_MODEL}/infer", {**infer_json(), "stepz": 7}), "'stepz' is unknown in the body")
    body = infer_json()
    body["inputs"][0]["parameters"] = {"stepz": 7}
    refused(post(run, f"{UNARY_MODEL}/infer", body), "'stepz' is unknown in input clip's parameters")


@generate
def test_a_timeout_given_to_generate_is_kept(run, path):
    _status, text = post(run, path, {**JSON, "steps": 1000, "timeout": 300_000})
    # In the worker's words, or in Triton's where the request still waited behind the edit before it.
    assert "its timeout of 0.3 s passed" in text or "Request timeout expired" in text, text[-300:]
    for value in (-1, "soon", True):
        refused(post(run, path, {**JSON, "timeout": value}), f"timeout {value!r} is not a number of microseconds")


@generate
def test_parameters_and_ids_that_are_no_text(run, path):
    whole = json.dumps({**JSON, "X": "x"}).encode()
    for old, new in ((b'"X"', b'"\xff"'), (b'"X": "x"', b'"id": "\xff"')):
        refused(post(run, path, whole.replace(old, new)), "the body is not UTF-8")
    assert post(run, path, JSON)[0] == 200


def infer_json(**change: Any) -> dict[str, Any]:
    values = {"clip": ("BYTES", CLIP), "prompt": ("BYTES", "a panda is skiing"), "steps": ("INT32", 1), **change}
    return {
        "inputs": [
            {"name": name, "datatype": kind, "shape": [1], "data": [value]} for name, (kind, value) in values.items()
        ]
    }


# Ids.


def ended(run: Serving, name: str) -> list[str]:
    """What the log says of a request's end."""
    return [line for line in logged(run, f"request '{name}': ") if "begins" not in line]


def test_the_id_of_a_request_passes_from_the_unary_model_to_the_worker(run, wire):
    asked = request(UNARY_MODEL, raw(to_tensors(CLIP, replace(SHORT, seed=1))))
    for name, where in (("mine", "worker.py"), ("again", "unary.py")):  # the second from the cache
        asked.id = name
        reply = wire.stub.ModelInfer(asked, timeout=60)
        assert reply.id == name
        assert told_id(reply) == name
        (line,) = ended(run, name)
        assert where in line and "OK" in line


def told_id(reply: Any) -> str:
    by_name = dict(zip((output.name for output in reply.outputs), reply.raw_output_contents, strict=True))
    return by_name["request_id"][4:].decode()


def test_a_request_without_an_id_gets_one_the_same_in_both_models_and_the_answer(run, wire):
    asked = raw(to_tensors(CLIP, replace(SHORT, seed=2)))
    first, cached = (told_id(wire.stub.ModelInfer(request(UNARY_MODEL, asked), timeout=60)) for _ in range(2))
    assert first != cached and re.fullmatch("[0-9a-f]{12}", first)
    assert "worker.py" in ended(run, first)[0]
    assert "from the cache" in ended(run, cached)[0]


def test_every_response_of_a_stream_names_the_request(run, wire):
    (name,) = {response["request_id"][0] for response in wire.ask(GOOD).responses if response}
    assert ended(run, name.decode())
    _status, text = post(run, f"{STREAM_MODEL}/generate_stream", {**JSON, "steps": 0})
    found = re.search('"request_id":"([0-9a-f]{12})"', text)
    assert found, text
    assert "INVALID_ARGUMENT" in ended(run, found[1])[0]


def test_the_clients_id_is_in_the_log(run):
    with Client(run.urls["gRPC"]) as client:
        edit = client.edit(CLIP, SHORT)
    assert "OK" in ended(run, edit.request_id)[0]


# Proxies.


def test_nothing_that_stays_on_this_machine_goes_through_a_proxy(run, proxy, tmp_path, capsys):
    url, http = run.urls["gRPC"], run.urls["HTTP"]
    others = [url, url.replace("127.0.0.1", "LOCALHOST"), url.replace("127.0.0.1", "127.0.0.2")]
    for number, address in enumerate(others[:2]):
        out = tmp_path / f"{number}.mp4"
        asked = ["request", "--clip", CLIP, "--prompt", "a panda", "--steps", "1", "--url", address, "--out", str(out)]
        assert cli.main(asked) == 0
        assert read(out).frames.shape[0] == 4
    urls = ["--http-url", http.replace("127.0.0.1", "localhost"), "--metrics-url", run.urls["metrics"]]
    assert [cli.main(["probe", *urls]) for _ in range(3)] == [0] * 3
    assert "alive: the worker answered\n" in capsys.readouterr().out  # busy, while a probe of `serve` itself waits
    with pytest.raises(InputError, match=f"no server answers at {others[2]}"), Client(others[2], retry=ONCE) as client:
        client.edit(CLIP, SHORT)  # it listens at 127.0.0.1 alone
    plain = [sys.executable, ROOT / "examples" / "plain_client.py", url, CLIP, "a panda", tmp_path / "frames.npy"]
    subprocess.run(plain, check=True, capture_output=True, timeout=60)
    assert np.load(tmp_path / "frames.npy").shape[0] == 1
    asyncio.run(by_asyncio(url))
    assert (proxy.asked, run.restarts()) == ([], 0), run.errors


ONCE = Retry(attempts=1)


async def by_asyncio(url: str) -> None:
    async with AsyncClient(url, retry=ONCE) as client:
        await client.edit(CLIP, SHORT)


def test_another_machine_is_reached_through_the_proxy(proxy, monkeypatch):
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies that it saw first
    proxy.asked.clear()
    assert probe("http://192.0.2.1:8000", "http://192.0.2.1:8002/metrics").state == "dead"
    with Client("192.0.2.1:8001", retry=ONCE) as client, pytest.raises(InputError, match="no server answers"):
        client.edit(CLIP, SHORT)
    assert any(b"GET http://192.0.2.1:8002" in text for text in proxy.asked)
    assert any(b"CONNECT 192.0.2.1:8001" in text for text in proxy.asked)
    proxy.asked.clear()
