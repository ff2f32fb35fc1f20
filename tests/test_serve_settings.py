"""The flags of `tav-opt serve` that say how the worker works, against the real server."""

from __future__ import annotations

import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import supervised
import tyro
from google.protobuf import text_format
from supervised import CLIP, SHORT
from tritonclient.grpc import model_config_pb2

from tav_opt import cli
from tav_opt.client import Client, Retry, ServerError
from tav_opt.config import WorkerConfig
from tav_opt.contract import STREAM_MODEL
from tav_opt.repository.model_files import configure, write_model_files
from tav_opt.serving.host import gpus
from tav_opt.serving.host.serve_config import ServeConfig

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
        endless = replace(LONG, prompts=LONG.prompts * 8)  # the first must outlast the second instance's start
        for _ in range(2):  # one after the other: together they would fill the queue before an instance takes one
            running.append(client.stream(CLIP, endless))
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


@pytest.mark.parametrize(
    ("asked", "there", "words"),
    [
        ("0,1", 0, "gpus 0,1: PyTorch sees no GPU"),
        ("1,3", 2, "gpus 1,3: there is no GPU 3; there are 0, 1"),
        ("1,1", 2, "gpus 1,1: one is named twice"),
        ("-1", 2, "there is no GPU -1"),
    ],
)
def test_gpus_that_are_not_there_are_refused_in_one_line(repository, monkeypatch, capsys, asked, there, words):
    monkeypatch.setattr(gpus, "present", lambda: range(there))
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    assert cli.main(["serve", "--repository", str(repository), *ports, f"--gpus={asked}"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "kind", "expected"), [((), "KIND_AUTO", []), ((1,), "KIND_GPU", [1]), ((0, 2), "KIND_GPU", [0, 2])]
)
def test_instances_are_placed_on_the_gpus_that_are_named_else_wherever_they_can(tmp_path, asked, kind, expected):
    write_model_files(tmp_path / "repository")
    configure(tmp_path / "served", tmp_path / "repository", WorkerConfig(instances=3), gpus=asked)
    text = (tmp_path / "served" / STREAM_MODEL / "config.pbtxt").read_text()
    (group,) = text_format.Parse(text, model_config_pb2.ModelConfig()).instance_group
    assert (group.count, list(group.gpus)) == (3, expected)
    assert group.Kind.Name(group.kind) == kind


def test_gpus_come_from_the_command_line_to_the_servers_configuration():
    found = tyro.cli(ServeConfig, args=["--gpus", "0,2", "--instances", "2"])
    assert found.gpus == (0, 2) and found.worker.instances == 2
    assert tyro.cli(ServeConfig, args=[]).gpus == ()


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
