"""The flags of `tav-opt serve` that say how the worker works, against the real server."""

from __future__ import annotations

import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import supervised
from supervised import CLIP, SHORT

from tav_opt import cli
from tav_opt.client import Client, Retry, ServerError
from tav_opt.config import WorkerConfig
from tav_opt.contract import STREAM_MODEL
from tav_opt.model_repository import configure, write_model_files

LONG = replace(SHORT, steps=1000)


@pytest.fixture(scope="module")
def repository(golden, tmp_path_factory):
    return supervised.repository(golden, tmp_path_factory.getbasetemp())


def metrics(run: supervised.Serving) -> str:
    with urllib.request.urlopen(run.urls["metrics"], timeout=60) as page:
        return page.read().decode()


def test_two_instances_edit_at_once_and_one_request_waits(repository, tmp_path):
    flags = ["--instances", "2", "--queue-size", "1", "--log-prompts", "--cache", str(tmp_path / "cache")]
    with (
        supervised.serving(repository, *flags) as run,
        Client(run.urls["gRPC"], retry=Retry(attempts=1)) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        running = []
        for _ in range(2):  # one after the other: together they would fill the queue before an instance takes one
            running.append(client.stream(CLIP, LONG))
            next(running[-1])
        third = pool.submit(client.edit, CLIP, replace(SHORT, inversion_steps=2))
        ends = time.monotonic() + 60
        while f'pending_request_count{{model="{STREAM_MODEL}",version="1"}} 1' not in metrics(run):
            assert time.monotonic() < ends
            time.sleep(0.05)
        with pytest.raises(ServerError, match="maximum queue size") as caught:
            client.edit(CLIP, SHORT)
        assert caught.value.status == "UNAVAILABLE"
        for stream in running:
            stream.cancel()
        assert third.result(60).frames.shape[0] == 1
        assert 'instance="tune_a_video_stream_0_1"' in metrics(run)
    assert list((tmp_path / "cache").glob("*.safetensors"))
    assert any(SHORT.prompts[0] in line for line in run.errors)


def test_a_setting_out_of_range_is_named(repository, capsys):
    assert cli.main(["serve", "--repository", str(repository), "--grpc-port", "0", "--queue-size", "0"]) == 2
    error = capsys.readouterr().err
    assert "queue size 0 is not within" in error and error.count("\n") == 1


def test_what_is_exported_later_is_served_with_the_settings_of_the_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model_files(Path("repository"))
    configure(tmp_path / "configured", Path("repository"), WorkerConfig(queue_size=7, cache=Path("kept")))
    clip = Path("repository") / STREAM_MODEL / "1" / "clips" / "new"
    clip.mkdir(parents=True)
    assert (tmp_path / "configured" / STREAM_MODEL / "1" / "clips" / "new").is_dir()
    text = (tmp_path / "configured" / STREAM_MODEL / "config.pbtxt").read_text()
    assert "max_queue_size: 7" in text
    assert f'"{tmp_path / "kept"}"' in text, "the worker runs in another folder"
    assert "max_queue_size: 16" in (Path("repository") / STREAM_MODEL / "config.pbtxt").read_text()
