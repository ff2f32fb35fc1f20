"""Requests changed at random, and made of the gateway's own description: refused in our words, or what they say."""

from __future__ import annotations

import operator
import subprocess
import sys
from collections.abc import AsyncGenerator
from functools import reduce
from pathlib import Path
from typing import Any

import fuzz_gateway
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from served import Raw, request
from starlette.testclient import TestClient
from test_gateway import GOOD
from tritonclient.grpc import service_pb2

from tav_opt.contract import STREAM_MODEL
from tav_opt.serving.gateway import openapi, rules
from tav_opt.serving.gateway.behind import Refusal, Trace
from tav_opt.serving.gateway.http_face import HttpFace

CORPUS = Path(__file__).with_name("corpus")


def fuzz(kind: str, runs: int, folder: Path) -> None:
    """`runs` inputs, led by what each of them reaches, from the corpus that is kept."""
    limits = [f"-runs={runs}", "-timeout=10", "-rss_limit_mb=4096", f"-artifact_prefix={folder}/found-"]
    command = [sys.executable, fuzz_gateway.__file__, kind, str(folder), str(CORPUS / kind), *limits]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and f"Done {runs} runs" in run.stderr, run.stderr[-3000:]


@pytest.mark.parametrize("kind", fuzz_gateway.DECODERS)
def test_three_hundred_of_each(kind, tmp_path):
    fuzz(kind, 300, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("kind", fuzz_gateway.DECODERS)
def test_ten_thousand_of_each(kind, tmp_path):
    fuzz(kind, 10_000, tmp_path)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_corpus_passes_or_is_refused_as_its_names_say(path):
    refused = {"wrapping", "nested", "many-sizes", "surrogate", "numbers", "overflow"}
    assert fuzz_gateway.look(path.parent.name, path.read_bytes()) == (path.name not in refused)


def test_the_fuzzer_would_find_what_killed_triton(monkeypatch):
    """Were shapes multiplied as Triton does it, in 64 bits."""
    monkeypatch.setattr(rules.math, "prod", lambda sizes: reduce(operator.mul, sizes) % 2**64)
    data = request(STREAM_MODEL, GOOD | {"source_frames": Raw("UINT8", (2**31, 2**31, 4, 3), b"")}).SerializeToString()
    with pytest.raises((AssertionError, ValueError)):
        fuzz_gateway.look("grpc", data)


class Answers:
    """In Triton's place: what passes the gateway is looked at, and answered."""

    def __init__(self) -> None:
        self.passed = 0

    async def ask(self, method: str, _message: bytes, _timeout_s: float | None = 5.0, trace: Trace = ()) -> bytes:
        answers: dict[str, Any] = {
            "ServerLive": service_pb2.ServerLiveResponse(live=True),
            "ServerReady": service_pb2.ServerReadyResponse(ready=True),
            "ModelReady": service_pb2.ModelReadyResponse(ready=True),
            "ServerMetadata": service_pb2.ServerMetadataResponse(name="triton", version="2.51", extensions=["x"]),
            "ModelMetadata": service_pb2.ModelMetadataResponse(name="tune_a_video", versions=["1"]),
        }
        return answers[method].SerializeToString()

    async def infer(self, message: rules.Message, _timeout_s: float | None = None, trace: Trace = ()) -> bytes:
        fuzz_gateway.obeys(message)
        self.passed += 1
        response = service_pb2.ModelInferResponse(model_name=message.model_name, id=message.id)
        response.outputs.add(name="fps", datatype="FP32", shape=[1])
        response.raw_output_contents.append(b"\0\0\0\0")
        return response.SerializeToString()

    async def stream(
        self, message: rules.Message, _timeout_s: float | None = None, trace: Trace = ()
    ) -> AsyncGenerator[bytes, None]:
        response = service_pb2.ModelInferResponse.FromString(await self.infer(message))
        yield service_pb2.ModelStreamInferResponse(infer_response=response).SerializeToString()

    def count(self, refusal: Refusal) -> Refusal:
        return refusal


TRITON = Answers()
APP = HttpFace(TRITON).app  # type: ignore[arg-type]
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)


@SCHEMA.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_what_the_description_allows_and_its_neighbours(case):
    """Schemathesis's checks: no 5xx, no status, type or body that the description does not have, and nothing accepted
    that it forbids. It cannot say all that the contract asks for: what it allows may be refused.
    """
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


@pytest.mark.full
@SCHEMA.parametrize()
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
def test_very_many_of_them(case):
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


def test_some_of_them_are_answered_and_all_routes_are_described():
    client = TestClient(APP)
    before = TRITON.passed
    asked = {"clip": "first", "prompt": ["a panda", "a bear"], "steps": 3, "guidance_scale": 7.5, "inversion": True}
    for path in ("tune_a_video/generate", "tune_a_video_stream/generate_stream", "tune_a_video_clips/generate"):
        body = {"clip": "first"} if "clips" in path else asked
        assert client.post(f"/v2/models/{path}", json=body).status_code == 200
    assert TRITON.passed == before + 3
    told = client.get("/openapi.json").json()
    assert told == openapi.document()
    for path, methods in told["paths"].items():
        for method in methods:
            assert client.request(method, path, json={}).status_code != 404
    for route in APP.routes:
        if "{rest" not in route.path and "{version}" not in route.path and route.path != "/openapi.json":
            assert route.path.replace("{model}", "tune_a_video") in told["paths"]
