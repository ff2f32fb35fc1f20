"""Requests made of the API's own description: no 5xx, and no answer that it does not have."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from api_process import KEY
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient
from test_api_jobs import EDIT, Fake, World

from tav_opt.api.application import application
from tav_opt.api.asked_fields import SPOKEN_FOR
from tav_opt.api.keys import Keys
from tav_opt.api.runner import Runner
from tav_opt.api.service import Service
from tav_opt.contract import STREAM_INPUTS

HEADERS = {"Authorization": f"Bearer {KEY}"}


FOLDER = tempfile.TemporaryDirectory(prefix="tav-opt-api-")
WORLD = World(Path(FOLDER.name) / "jobs", queue=10_000)


def before_a_server(world: World) -> Any:
    """The application before a server that tells of its clip, with nobody at work on the jobs."""
    client: Any = Fake()
    runner = Runner(world.config, world.jobs, world.files, client)
    parts = {"config": world.config, "jobs": world.jobs, "files": world.files, "runner": runner, "client": client}
    return application(Service(keys=Keys({KEY: "anna"}), **parts))


APP = before_a_server(WORLD)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@SCHEMA.parametrize()
@settings(max_examples=25, derandomize=True, **QUICK)
def test_what_the_description_allows_and_its_neighbours(case):
    """Schemathesis's checks: no 5xx, no status, type or body that the description does not have, nothing accepted that
    it forbids, and nothing without a key. It cannot say all that a clip asks for: what it allows may be refused.
    """
    case.call_and_validate(headers=HEADERS, excluded_checks=[positive_data_acceptance])


def taking(kind: str) -> Any:
    """The same description, of bodies of one kind alone."""
    raw = copy.deepcopy(APP.openapi())
    for path, methods in list(raw["paths"].items()):
        for method, operation in list(methods.items()):
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]
                operation["requestBody"]["content"] = {kind: content[kind]}
            elif kind != "application/json":
                del raw["paths"][path][method]
    found = schemathesis.openapi.from_dict(raw)
    found.app = APP
    return found


JSON, FORMS = taking("application/json"), taking("multipart/form-data")
# Nothing wrong is drawn of a form: all in it is text, and schemathesis fails over files of its own making.
FORMS.config.generation.update(modes=[schemathesis.GenerationMode.POSITIVE])


@pytest.mark.full
@JSON.parametrize()
@settings(max_examples=1000, **QUICK)
def test_very_many_of_them(case):
    case.call_and_validate(headers=HEADERS, excluded_checks=[positive_data_acceptance])


@pytest.mark.full
@FORMS.parametrize()
@settings(max_examples=1000, **QUICK)
def test_very_many_forms(case):
    case.call_and_validate(headers=HEADERS, excluded_checks=[positive_data_acceptance])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/videos?limt=3", "'limt' is no parameter here; there are: after, limit, order"),
        ("/v1/videos?=", "'' is no parameter here"),
        ("/v1/models?after=x", "'after' is no parameter here; there are: none"),
    ],
)
def test_parameters_that_there_are_not_are_refused(path, words):
    answer = TestClient(APP, headers=HEADERS).get(path)
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(words)


def test_what_is_asked_for_is_answered_and_all_settings_are_described():
    client = TestClient(APP, headers=HEADERS)
    body = {"model": "toy@fast", "prompt": "x", "seed": 3, "seconds": "0.5", "size": "48x32"}
    found = client.post("/v1/videos", json=body)
    assert found.status_code == 200 and found.json()["queue_position"] == WORLD.jobs.unfinished_of("anna") - 1
    paths = client.get("/openapi.json").json()["paths"]
    content = paths["/v1/videos"]["post"]["requestBody"]["content"]
    for kind in ("application/json", "multipart/form-data"):
        assert {t.name for t in STREAM_INPUTS} - set(SPOKEN_FOR) <= set(content[kind]["schema"]["properties"])
    assert set(paths) == {"/health", "/v1/models", "/v1/models/{name}", "/v1/videos", "/v1/videos/edits"} | {
        f"/v1/videos/{{video_id}}{end}" for end in ("", "/content", "/events")
    }


def test_files_of_a_finished_video_are_sent_as_described():
    client = TestClient(APP, headers=HEADERS)
    made = client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    WORLD.jobs.complete(made, WORLD.files.store(made, EDIT, "x"), 60)
    for variant, kind in (("video", "video/mp4"), ("thumbnail", "image/png"), ("spritesheet", "image/png")):
        answer = client.get(f"/v1/videos/{made}/content", params={"variant": variant})
        assert answer.headers["content-type"] == kind and answer.content == WORLD.files.path(made, variant).read_bytes()
    part = client.get(f"/v1/videos/{made}/content", headers={**HEADERS, "Range": "bytes=0-9"})
    assert part.status_code == 206 and len(part.content) == 10
    WORLD.files.remove(made)
    assert client.get(f"/v1/videos/{made}/content").status_code == 404


@pytest.mark.parametrize(
    "path", ["/v1/videos/../../../etc/passwd", "/v1/videos/%2e%2e%2f%2e%2e%2fetc/content", "/v1/videos/x/y"]
)
def test_ids_are_no_paths(path):
    answer = TestClient(APP, headers=HEADERS).get(path)
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "invalid_request_error"


def test_a_full_disk_is_told_as_such():
    client = TestClient(APP, headers=HEADERS, raise_server_exceptions=False)
    WORLD.jobs._db.execute("pragma max_page_count = 1")  # none may be added to those there are
    try:
        answers = [client.post("/v1/videos", json={"prompt": "x" * 4000}) for _ in range(20)]
    finally:
        WORLD.jobs._db.execute("pragma max_page_count = 1000000")
    assert answers[-1].status_code == 503 and answers[-1].json()["error"]["code"] == "storage_full"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "", {"GET", "POST"}),
        ("GET", "/edits", {"POST"}),
        ("DELETE", "/edits", {"POST"}),
        ("POST", "/x", {"GET", "DELETE"}),
    ],
)
def test_other_methods_are_told_which_there_are(method, path, allowed):
    answer = TestClient(APP, headers=HEADERS).request(method, f"/v1/videos{path}")
    assert answer.status_code == 405 and set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/edits/content", "/edits/events", "?after=edits"])
def test_edits_is_no_video_and_a_route_by_itself_alone(path):
    assert TestClient(APP, headers=HEADERS).get(f"/v1/videos{path}").status_code == 404
