"""OpenAI's videos API, asked by OpenAI's own client, in front of a real server."""

from __future__ import annotations

import base64
import io
import json
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
import supervised
import trustme
from api_process import KEY, Api, ended, running, under_way
from exported import FRAMES, SIDE, Exported, export_once
from openai import OpenAI
from PIL import Image
from served import serving, until

from tav_opt import cli, video
from tav_opt.client import Client
from tav_opt.config import EditConfig, WorkerConfig
from tav_opt.serving.host.server import Server

OTHER = "another-key-of-another-owner"
SHORT = {"steps": 2, "guidance_scale": 7.5}
LONG = {"steps": 400}
ALIKE = 2.0
"""Of 255, in the mean: in the last bits an edit depends on what else the server computes meanwhile, and random weights
and an MP4 make more of them."""
PROMPT = "a panda is skiing"


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def server(exported: Exported) -> Iterator[Server]:
    with serving(exported.repository, WorkerConfig()) as found:
        yield found


@pytest.fixture(scope="module")
def api(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("api")
    (folder / "keys").write_text(f"# whose they are\nanna {KEY}\nberta {OTHER}\n")
    with running(folder / "jobs", server.grpc_url, "--keys", str(folder / "keys"), "--queue", "4") as found:
        yield found


@pytest.fixture(scope="module")
def client(api: Api) -> OpenAI:
    return api.client()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Another clip of as many frames, larger than the exported one."""
    frames = np.random.default_rng(5).integers(0, 256, (FRAMES, 96, 128, 3), dtype=np.uint8)
    video.write(tmp_path / "other.mp4", frames, 4)
    return tmp_path / "other.mp4"


def fetched(client: OpenAI, video_id: str) -> bytes:
    return client.videos.download_content(video_id).content


def off(one: bytes, other: bytes) -> float:
    """Mean difference of two videos, of 255."""
    frames, expected = (video.decode(file).frames.astype(int) for file in (one, other))
    return float(np.abs(frames - expected).mean())


def posted(api: Api, path: str, body: dict[str, object], key: str = KEY, status: int = 200) -> dict[str, Any]:
    """In JSON, where OpenAI's client has only forms, and refuses the id of a video."""
    answer = httpx.post(f"{api.url}/{path}", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    assert answer.status_code == status, answer.text
    return answer.json()


def settings(mp4: bytes) -> dict[str, object]:
    """What a file says of itself."""
    with av.open(io.BytesIO(mp4)) as container:
        return json.loads(container.metadata["comment"])


# What is asked for, and what comes.


def test_a_video_is_the_edit_that_the_server_makes(server, client):
    asked = client.videos.create(prompt=PROMPT, model="first", seconds="0.5", size="64x64", extra_body=SHORT)
    assert (asked.status, asked.progress, asked.object) == ("queued", 0, "video")
    assert (asked.model, asked.prompt, asked.seconds, asked.size) == ("first", PROMPT, "0.5", f"{SIDE}x{SIDE}")
    done = ended(client, asked.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None), done
    assert done.completed_at >= done.created_at and done.expires_at - done.completed_at == 24 * 3600
    with Client(server.grpc_url) as direct:
        edit = EditConfig(prompts=(PROMPT,), **SHORT)
        (expected,) = direct.edit("first", edit, output="mp4").videos
        (other,) = direct.edit("first", replace(edit, prompts=("a bear",)), output="mp4").videos
    assert off(fetched(client, asked.id), expected) < ALIKE < off(other, expected)
    assert settings(fetched(client, asked.id)) == settings(expected) == done.settings


def test_its_pictures_are_those_of_its_frames(client):
    asked = client.videos.create(prompt=PROMPT, model="first", extra_body=SHORT)
    ended(client, asked.id)
    frames = video.decode(fetched(client, asked.id)).frames
    thumbnail = client.videos.download_content(asked.id, variant="thumbnail").content
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(thumbnail))), frames[FRAMES // 2])
    sheet = Image.open(io.BytesIO(client.videos.download_content(asked.id, variant="spritesheet").content))
    assert sheet.width > FRAMES * 192 and np.asarray(sheet).std() > 10


def test_a_video_that_is_sent_is_edited_in_the_clips_place(server, client, clip):
    asked = client.videos.edit(prompt=PROMPT, video=clip, extra_body={**SHORT, "model": "first", "stride": 1})
    done = ended(client, asked.id)
    assert done.status == "completed", done
    with Client(server.grpc_url) as direct:
        edit = EditConfig(prompts=(PROMPT,), **SHORT)
        (expected,) = direct.edit("first", edit, output="mp4", video=clip, stride=1).videos
    found = fetched(client, asked.id)
    assert off(found, expected) < ALIKE and video.decode(found).fps == 4
    assert (done.seconds, done.size) == ("1", "64x64")


def test_a_video_that_was_made_here_is_edited_again_and_data_urls_are_files(api, client):
    first = client.videos.create(prompt=PROMPT, model="first", extra_body=SHORT)
    mp4 = (ended(client, first.id), fetched(client, first.id))[1]
    by_id = posted(api, "videos/edits", {"prompt": "a bear", "video": {"id": first.id}, **SHORT})
    assert by_id["remixed_from_video_id"] == first.id and by_id["model"] == "first"
    url = "data:video/mp4;base64," + base64.b64encode(mp4).decode()
    body = {"prompt": "a bear", "model": "first", "input_reference": url, "stride": 1, **SHORT}
    by_url = posted(api, "videos", body)
    found = [video.decode(fetched(client, ended(client, one["id"]).id)).frames for one in (by_id, by_url)]
    assert np.array_equal(*found)


# How far it is.


def test_progress_is_told_as_it_comes(api, client):
    asked = client.videos.create(prompt=PROMPT, model="first", extra_body={"steps": 30})
    headers = {"Authorization": f"Bearer {KEY}"}
    events, shown = [], []
    with httpx.stream("GET", f"{api.url}/videos/{asked.id}/events", headers=headers, timeout=120) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event: "):
                events.append(line.removeprefix("event: "))
            elif line.startswith("data: "):
                shown.append(json.loads(line.removeprefix("data: ")))
    assert events[-1] == "video.completed" and shown[-1] == client.videos.retrieve(asked.id).model_dump()
    progress = [one["progress"] for one in shown]
    assert progress == sorted(progress) and progress[-1] == 100 and len(set(progress)) > 10


def test_pages_have_all_videos_once(client):
    made = [client.videos.create(prompt=f"{n}", model="first", extra_body=SHORT).id for n in range(3)]
    listed = [one.id for one in client.videos.list(limit=2)]
    assert listed[:3] == made[::-1] and len(set(listed)) == len(listed)
    assert [one.id for one in client.videos.list(limit=2, order="asc")] == listed[::-1]
    page = client.videos.list(limit=1, after=listed[0])
    assert [one.id for one in page.data] == listed[1:2] and page.has_more
    for one in made:
        client.videos.delete(one)


def test_a_video_that_is_removed_is_cancelled_on_the_server(server, client):
    asked = client.videos.create(prompt=PROMPT, model="first", extra_body=LONG)
    assert 0 < under_way(client, asked.id).progress < 90
    server.log.clear()
    assert client.videos.delete(asked.id).deleted
    until(lambda: any("CANCELLED" in line for line in list(server.log)))
    with pytest.raises(openai.NotFoundError, match="unknown"):
        client.videos.retrieve(asked.id)


# Models.


def test_models_are_the_exported_clips(client):
    (model,) = client.models.list().data
    assert (model.id, model.caption, model.frames, model.size) == ("first", "a panda is skiing", FRAMES, "64x64")
    assert (model.fps, model.seconds) == (8.0, "0.5")
    assert client.models.retrieve("first@fast").id == "first@fast"
    for name in ("second", "first@slow"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


def test_the_only_model_need_not_be_named_and_a_preset_may_be(client):
    asked = client.videos.create(prompt=PROMPT, model="first@draft", extra_body={"steps": 3})
    done = ended(client, asked.id)
    assert done.settings["steps"] == 3 and done.settings["guidance_interval"] == 3, done
    plain = client.videos.create(prompt=PROMPT, extra_body=SHORT)
    assert plain.model == "first" and client.videos.delete(plain.id).deleted


# What is refused.


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ({"model": "second"}, openai.NotFoundError, "model 'second' is unknown; exported are: first"),
        ({"model": "../first"}, openai.NotFoundError, "is unknown"),
        ({"model": "first@slow"}, openai.BadRequestError, "preset 'slow' is not exact, fast, draft"),
        ({"seconds": "4"}, openai.BadRequestError, "seconds 4: clip first has 0.5"),
        ({"size": "720x1280"}, openai.BadRequestError, "size 720x1280: clip first has 64x64"),
        ({"extra_body": {"num_frames": 5}}, openai.BadRequestError, "num_frames 5: clip first has 4"),
        ({"extra_body": {"steps": 0}}, openai.BadRequestError, "steps '0': Input should be greater"),
        ({"extra_body": {"stepps": 3}}, openai.BadRequestError, "stepps is unknown"),
        ({"extra_body": {"steps": 3, "num_inference_steps": 3}}, openai.BadRequestError, "give one of them"),
        ({"extra_body": {"stride": 2}}, openai.BadRequestError, "there is none"),
        ({"prompt": ""}, openai.BadRequestError, "prompt '': String should have at least 1"),
        ({"prompt": "x" * 5000}, openai.BadRequestError, "at most 4096"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_refused_in_one_line(client, asked, kind, words):
    with pytest.raises(kind) as refused:
        client.videos.create(**{"prompt": PROMPT, "model": "first", **asked})
    assert words in refused.value.message and refused.value.body["type"] == "invalid_request_error"
    assert "\n" not in refused.value.body["message"]


@pytest.mark.parametrize(
    "reference",
    ["http://127.0.0.1/x.mp4", "/etc/passwd", "data:video/mp4,x", "data:;base64,???", {"image_url": "x"}, 3],
)
def test_no_other_place_of_a_video_is_looked_at(api, reference):
    for path, name in (("videos", "input_reference"), ("videos/edits", "video")):
        told = posted(api, path, {"prompt": PROMPT, name: reference}, status=400)["error"]
        assert told["message"].startswith(name) and "\n" not in told["message"]


@pytest.mark.parametrize("content", [b"", b"no video", b"\0\0\0\x18ftypmp42" + b"\xff" * 5000])
def test_a_file_that_is_no_video_fails_in_its_words(client, content):
    asked = client.videos.edit(prompt=PROMPT, video=("../../x.mp4", content), extra_body={"model": "first"})
    done = ended(client, asked.id)
    assert done.status == "failed" and done.error.code == "invalid_request"
    assert done.error.message.startswith("video: clip") and "the clip takes 4 frames of 64×64" in done.error.message
    with pytest.raises(openai.NotFoundError, match="is failed: there is nothing to fetch"):
        fetched(client, asked.id)


def test_strangers_are_kept_out_and_owners_apart(api, client):
    asked = client.videos.create(prompt=PROMPT, model="first", extra_body=SHORT)
    for key in ("wrong", "", KEY + "x"):
        with pytest.raises(openai.AuthenticationError):
            api.client(key or "-").videos.retrieve(asked.id)
    berta = api.client(OTHER)
    for ask in (berta.videos.retrieve, berta.videos.delete, berta.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            ask(asked.id)
    assert berta.videos.list().data == []
    posted(api, "videos/edits", {"prompt": PROMPT, "video": {"id": asked.id}}, key=OTHER, status=404)
    assert ended(client, asked.id).status == "completed"


def test_a_key_has_so_many_waiting_and_no_more(client):
    waiting = [client.videos.create(prompt=PROMPT, model="first", extra_body=LONG).id for _ in range(4)]
    with pytest.raises(openai.RateLimitError, match="4 of your videos are waiting") as refused:
        client.videos.create(prompt=PROMPT, model="first", extra_body=LONG)
    assert refused.value.response.headers["retry-after"] == "10"
    assert client.videos.retrieve(waiting[3]).queue_position in (1, 3)
    for one in waiting:
        client.videos.delete(one)


def test_what_is_too_large_is_refused_before_it_is_read(api):
    address = httpx.URL(api.url)
    head = f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {65 << 20}\r\n\r\n"
    with socket.create_connection((address.host, address.port), timeout=30) as connection:
        connection.sendall(head.encode())  # and nothing of the body
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    chunks = iter([b"x" * (1 << 20)] * 65)
    answer = httpx.post(f"{api.url}/videos", content=chunks, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.status_code == 413 and answer.json()["error"]["message"].startswith("the body has more than 64 MiB")


# What outlives the process.


def test_jobs_survive_a_kill_and_what_is_done_stays_done(server, tmp_path):
    with running(tmp_path / "jobs", server.grpc_url, "--parallel", "1") as api:
        client = api.client()
        done = ended(client, client.videos.create(prompt=PROMPT, extra_body=SHORT).id)
        mp4 = fetched(client, done.id)
        amid = client.videos.create(prompt=PROMPT, extra_body={"steps": 60}).id
        waiting = client.videos.create(prompt="a bear", extra_body=SHORT).id
        under_way(client, amid)
        api.kill()
    with running(tmp_path / "jobs", server.grpc_url) as api:
        client = api.client()
        assert client.videos.retrieve(done.id) == done and fetched(client, done.id) == mp4
        assert [ended(client, one).status for one in (amid, waiting)] == ["completed"] * 2
        assert f"the API ended while it made this video; {amid} is run again" in "".join(api.errors)
        assert "".join(api.errors).count("is run again") == 1
        again = client.videos.create(prompt=PROMPT, extra_body=LONG).id
        under_way(client, again)
        assert api.stop() == 143
    with running(tmp_path / "jobs", server.grpc_url) as api:
        client = api.client()
        assert under_way(client, again).status == "in_progress" and api.errors == []
        assert [one.id for one in client.videos.list()] == [again, waiting, amid, done.id]


def test_one_api_at_a_time_has_a_folder(api, server, capsys):
    folder = api.jobs
    assert cli.main(["api", "--jobs", str(folder), "--url", server.grpc_url, "--port", "0"]) == 2
    assert (
        capsys.readouterr().err
        == f"tav-opt api: {folder} is in use by another tav-opt api: choose another with --jobs\n"
    )


@pytest.mark.full
def test_a_server_that_dies_amid_a_video_and_one_that_is_away_are_outlived(golden, tmp_path):
    folder = supervised.repository(golden, tmp_path)
    with supervised.serving(folder) as run, running(tmp_path / "jobs", run.urls["gRPC"], "--parallel", "1") as api:
        client = api.client()
        done = ended(client, client.videos.create(prompt=PROMPT, extra_body=SHORT).id)
        amid, waiting = (client.videos.create(prompt=PROMPT, extra_body={"steps": 60}).id for _ in range(2))
        under_way(client, amid)
        supervised.triton(run.process).kill()
        told = [ended(client, one) for one in (amid, waiting)]
        assert [one.status for one in told] == ["completed"] * 2, told
        assert client.videos.retrieve(done.id) == done
        again, next_one = (video.decode(fetched(client, one)).frames.astype(int) for one in (amid, waiting))
        assert np.abs(again - next_one).mean() < 4, "the same edit: 60 steps make much of the last bits of sums"
        assert "".join(api.errors).count("is run again") == 1, api.errors
        run.process.terminate()
        run.ended()
        late = client.videos.create(prompt=PROMPT, extra_body=SHORT)  # of a clip that was told of before
        until(lambda: any("waits, again in" in line for line in api.errors))
        address = run.urls["gRPC"].rpartition(":")[2]
        with supervised.serving(folder, "--grpc-port", address):
            assert ended(client, late.id).status == "completed"


# How it listens, and for whom.


def test_it_speaks_tls_and_other_machines_need_keys(server, tmp_path):
    authority = trustme.CA()
    pair = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    pair.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "pair.pem"))
    secured = ("--tls-certificate", str(tmp_path / "pair.pem"), "--tls-key", str(tmp_path / "pair.pem"))
    with running(tmp_path / "jobs", server.grpc_url, *secured) as api:
        assert api.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        assert httpx.get(f"{api.url}/models", verify=trusting).json()["data"][0]["id"] == "first"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{api.url}/models")
        for header in ({"Origin": "https://example.org"}, {"Origin": "null"}, {"Host": "example.org"}):
            assert httpx.get(f"{api.url}/models", verify=trusting, headers=header).status_code == 403
        here = {"Origin": "http://localhost:3000"}
        assert httpx.get(f"{api.url}/models", verify=trusting, headers=here).status_code == 200
