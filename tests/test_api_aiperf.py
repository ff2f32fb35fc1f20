"""NVIDIA's aiperf measures the videos API while the server, and then the API, is killed amid its jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import supervised
from api_process import KEY, ended, running, under_way
from openai import OpenAI
from served import until

from tav_opt import video

POLL_SECONDS = 10
"""What aiperf takes at the most. It does not ask again where nobody listens: an API has to be back by the next poll."""
JOBS, AT_ONCE = 4, 2


def begun(golden: Path, url: str, folder: Path) -> subprocess.Popen[str]:
    """aiperf, which asks for edits of 100 steps in twos, and writes what it found under `folder`."""
    if (program := shutil.which("aiperf")) is None:
        pytest.skip("aiperf is not installed")
    (folder / "prompts.jsonl").write_text("".join(f'{{"text": "{one}"}}\n' for one in ("a panda", "a bear")))
    asked = [f"--model=first --api-key={KEY} --url={url.removesuffix('/v1')} --endpoint-type=video_generation"]
    tokenizer = golden / "reference_checkpoint" / "sd" / "tokenizer"  # its own is fetched from the net
    asked += [f"--tokenizer={tokenizer} --custom-dataset-type=single_turn --download-video-content --ui=none"]
    asked += [f"--concurrency={AT_ONCE} --request-count={JOBS} --extra-inputs=num_inference_steps:100"]
    asked += [f"--input-file=prompts.jsonl --artifact-dir={folder / 'found'}"]
    # Offline, it takes the tokenizer's path for the name of a repository that it has fetched.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"AIPERF_HTTP_VIDEO_POLL_INTERVAL": str(POLL_SECONDS)}
    command = [program, "profile", *" ".join(asked).split()]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def in_work(client: OpenAI, count: int) -> str:
    """The video that is being made once so many are asked for, and aiperf has just polled for all of them."""
    until(lambda: len(client.videos.list().data) >= count, 200)
    time.sleep(1)
    until(lambda: any(one.status == "in_progress" for one in client.videos.list()), 200)
    (found,) = (one.id for one in client.videos.list() if one.status == "in_progress")
    return found


@pytest.mark.full
def test_nothing_that_aiperf_asks_for_is_lost_while_the_server_and_the_api_are_killed(golden, tmp_path):
    folder, jobs = supervised.repository(golden, tmp_path), tmp_path / "jobs"
    with supervised.serving(folder) as run:
        url = run.urls["gRPC"]
        with running(jobs, url, "--parallel", "1") as api:
            measuring = begun(golden, api.url, tmp_path)
            by_server = under_way(api.client(), in_work(api.client(), AT_ONCE)).id
            supervised.triton(run.process).kill()
            by_api = in_work(api.client(), AT_ONCE + 1)
            api.kill()
            assert "".join(api.errors).count(f"{by_server} is run again") == 1, api.errors
        port = api.url.removesuffix("/v1").rpartition(":")[2]
        with running(jobs, url, "--parallel", "1", "--port", port) as api:
            assert measuring.wait(300) == 0, measuring.communicate()[0][-3000:]
            assert "".join(api.errors).count(f"{by_api} is run again") == 1, api.errors
            client = api.client()
            made = [ended(client, one.id) for one in client.videos.list()]
            videos = [client.videos.download_content(one.id).content for one in made]
    assert [one.status for one in made] == ["completed"] * JOBS and run.restarts() == 1
    assert all(video.decode(mp4).frames.std() > 10 for mp4 in videos)
    (path,) = (tmp_path / "found").rglob("profile_export_aiperf.json")
    found = json.loads(path.read_text())
    assert found["request_count"]["avg"] == JOBS and not found.get("error_summary")
