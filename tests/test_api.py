"""OpenAI's videos API, asked by OpenAI's own client, in front of a real server."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import openai
import pytest
from api_process import KEY, Api, ended, running, under_way
from exported import FRAMES, SIDE, Exported, export_once
from openai import OpenAI
from PIL import Image
from served import serving, until

from tav_opt import video
from tav_opt.client import Client
from tav_opt.config import EditConfig, WorkerConfig
from tav_opt.serving.host.server import Server

OTHER = "another-key-of-another-owner"
SHORT = {"steps": 2, "guidance_scale": 7.5}
LONG = {"steps": 400}
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
    assert np.array_equal(video.decode(fetched(client, asked.id)).frames, video.decode(expected).frames)
    assert settings(fetched(client, asked.id)) == settings(expected) == done.settings
