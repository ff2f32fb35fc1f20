"""The worker alone, and the real server: what it serves equals eager editing, and how it starts, refuses and ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from exported import export_once
from served import Wire, raw, until
from supervised import on_free_ports, triton

from tav_opt import checkpoint, editing, models
from tav_opt.base.directory import Base
from tav_opt.checkpoint import Checkpoint
from tav_opt.client import Client
from tav_opt.config import EditConfig, InputError, TrainConfig
from tav_opt.contract import STREAM_MODEL, ClipInfo, to_tensors
from tav_opt.engines import pytorch
from tav_opt.repository import model_files
from tav_opt.repository.model_files import write_model_files
from tav_opt.serving.host import tritonserver
from tav_opt.serving.host.server import Server, ServerDied
from tav_opt.unet import clip_value_names

ROOT = Path(__file__).parents[1]
SHORT = EditConfig(prompts=("a panda is skiing",), steps=3, guidance_scale=7.5, inversion_steps=4)
LONG = replace(SHORT, steps=1000)


def test_the_model_files_in_git_are_those_generated(tmp_path):
    write_model_files(tmp_path)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        name = path.relative_to(tmp_path)
        committed = ROOT / "serving" / "model_repository" / name
        assert committed.read_text() == path.read_text(), f"{name}: generate it again"


# What a system may lack.


def test_a_program_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a program"):
        tritonserver.find_tritonserver(tmp_path / "tritonserver")


def test_the_server_of_the_path_comes_before_the_wheel(tmp_path, monkeypatch):
    program = tmp_path / "tritonserver"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tritonserver.find_tritonserver() == tritonserver.Installation(binary=program)


def test_an_absent_wheel_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(tritonserver.shutil, "which", lambda _name: None)
    monkeypatch.setattr(tritonserver.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"make server|this platform"):
        tritonserver.find_tritonserver()


def test_an_absent_libpython_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(tritonserver.sysconfig, "get_config_var", lambda _name: None)
    monkeypatch.setattr(tritonserver.ctypes.util, "find_library", lambda _name: None)
    with pytest.raises(InputError, match=rf"apt install libpython{tritonserver.PYTHON}"):
        tritonserver._libpython()


# The real server.


@pytest.fixture(scope="session")
def triton_installed() -> None:
    try:
        tritonserver.find_tritonserver()
    except InputError as lacking:
        pytest.skip(str(lacking))


@pytest.fixture(scope="session")
def ckpt(shallow, tmp_path_factory) -> Path:
    """A checkpoint of random values on the tests' base: 4 frames of 64×64."""
    sd = models.load(shallow)
    generator = torch.Generator().manual_seed(5)
    own = sd.unet.state_dict()
    names = clip_value_names(sd.unet, TrainConfig().trainable)
    values = {name: own[name] + 0.05 * torch.randn(own[name].shape, generator=generator) for name in names}
    source, inverted = torch.randn(2, 1, 4, 4, 8, 8, generator=generator)
    info = ClipInfo(
        base=str(shallow),
        base_hash=Base.at(shallow).hash,
        prompt="a man is skiing",
        frames=4,
        height=64,
        width=64,
        fps=8.0,
        inversion_steps=4,
    )
    folder = tmp_path_factory.mktemp("serving") / "ckpt"
    saved = Checkpoint(info=info, values=values, source_latents=source, inverted_latents=inverted)
    checkpoint.save(saved, folder, settings={})
    return folder


@pytest.fixture(scope="session")
def repository(golden, ckpt, triton_installed, tmp_path_factory) -> Path:
    """With the one clip `toy`, on the base that the tests share."""
    from tav_opt.export.exporting import export

    folder = export_once(golden, tmp_path_factory.getbasetemp()).repository
    export(ckpt, folder, name="toy")
    shutil.rmtree(folder / STREAM_MODEL / "1" / "clips" / "first")
    return folder


@pytest.fixture(scope="session")
def server(repository):
    with Server(on_free_ports(repository)) as running:
        yield running


@pytest.fixture
def client(server):
    with Client(server.grpc_url) as connected:
        yield connected


@pytest.mark.parametrize(
    "config",
    [
        replace(SHORT, prompts=("a panda is skiing", "a man"), negative_prompt="a dog"),
        replace(SHORT, inversion_steps=2, eta=0.5, seed=2**40),
        replace(SHORT, inversion=False, guidance_scale=1.0),
    ],
    ids=["two prompts", "inverted anew, eta", "from noise, unguided"],
)
def test_served_frames_equal_eager_editing(client, ckpt, config):
    expected = editing.edit(pytorch.open_checkpoint(ckpt), config)
    served = client.edit("toy", config)
    difference = np.abs(served.frames.astype(int) - expected)
    assert expected.std() > 10, "a flat picture would prove nothing"
    assert served.fps == 8.0
    assert difference.mean() <= 0.05, f"{difference.mean():.4f} of 255 in the mean"
    assert difference.max() <= 2, f"{difference.max()} of 255"


def test_plain_tritonclient_gets_the_same_frames(server, client, tmp_path):
    prompt, out = "a panda is skiing", tmp_path / "frames.npy"
    command = [sys.executable, ROOT / "examples" / "plain_client.py", server.grpc_url, "toy", prompt, out]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    expected = client.edit("toy", EditConfig(prompts=(prompt,), inversion_steps=4)).frames
    np.testing.assert_array_equal(np.load(out), expected)
    assert shown.splitlines()[0] == "sample 1 of 50"
    assert shown.splitlines()[-1] == "done 50 of 50"


@pytest.mark.parametrize(
    ("clip", "config", "words"),
    [
        ("nope", SHORT, "clip 'nope' is unknown; exported are: toy"),
        ("../toy", SHORT, "clip '../toy' is unknown"),
        ("toy", replace(SHORT, prompts=()), "0 prompts"),
        ("toy", replace(SHORT, prompts=(" ",)), "is empty"),
        ("toy", replace(SHORT, prompts=("skiing " * 40,)), "tokens long, 16 at most; too much"),
        ("toy", replace(SHORT, steps=0), "steps 0 is not within 1…1000"),
        ("toy", replace(SHORT, guidance_scale=float("nan")), "guidance scale nan"),
        ("toy", replace(SHORT, seed=2**64 - 1), "seed 18446744073709551615 is not within"),
    ],
)
def test_bad_requests_are_refused_in_one_line_and_the_server_lives(client, clip, config, words):
    with pytest.raises(InputError) as caught:
        client.edit(clip, config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert client.edit("toy", SHORT).frames.shape == (1, 4, 64, 64, 3)


def ask(url: str, tensors: dict[str, np.ndarray]) -> tuple[str, str]:
    """The gRPC status and message that answer a request with raw tensors."""
    with Wire(url) as wire:
        answer = wire.ask(raw(tensors))
    return answer.status, answer.message


@pytest.mark.parametrize(
    "change",
    [
        {"steps": np.array([3], np.int64)},
        {"steps": np.array([3, 3], np.int32)},
        {"guidance_scale": np.array([7.5], np.float64)},
        {"prompt": np.array([1.0], np.float32)},
        {"prompt": np.array([b"\xff"], object)},
        {"frobnicate": np.array([1], np.int32)},
    ],
    ids=lambda change: "-".join(f"{name}-{array.dtype}{array.shape}" for name, array in change.items()),
)
def test_malformed_tensors_are_refused_by_name(server, client, change):
    status, message = ask(server.grpc_url, {**to_tensors("toy", SHORT), **change})
    assert status == "INVALID_ARGUMENT", message
    assert next(iter(change)) in message
    assert client.edit("toy", SHORT).frames.shape == (1, 4, 64, 64, 3)


class _Enough(Exception):
    pass


def test_leaving_an_edit_cancels_it_on_the_server(server, client):
    def leave(_stage: str, step: int, _steps: int) -> None:
        if step == 2:
            raise _Enough

    server.log.clear()
    with pytest.raises(_Enough):
        client.edit("toy", LONG, on_progress=leave)
    client.edit("toy", SHORT)  # waits in the queue until the cancelled one has ended
    until(lambda: any("CANCELLED" in line for line in list(server.log)))


def test_closing_the_client_ends_its_edit(server):
    begun, raised = threading.Event(), []

    def edit() -> None:
        try:
            leaving.edit("toy", LONG, on_progress=lambda *_: begun.set())
        except Exception as error:
            raised.append(error)

    leaving = Client(server.grpc_url)
    thread = threading.Thread(target=edit)
    thread.start()
    assert begun.wait(60)
    leaving.close()
    thread.join(60)
    assert not thread.is_alive()
    assert getattr(raised[0], "status", raised) == "CANCELLED"


def test_clips_appear_and_disappear_without_a_restart(server, client, repository):
    clips = repository / STREAM_MODEL / "1" / "clips"
    os.rename(clips / "toy", clips / "moved")
    try:
        assert client.edit("moved", SHORT).frames.shape == (1, 4, 64, 64, 3)
        with pytest.raises(InputError, match="clip 'toy' is unknown; exported are: moved"):
            client.edit("toy", SHORT)
    finally:
        os.rename(clips / "moved", clips / "toy")
    client.edit("toy", SHORT)


def test_a_damaged_clip_is_the_servers_fault_and_does_not_end_it(server, client, repository):
    broken = repository / STREAM_MODEL / "1" / "clips" / "broken"
    broken.mkdir()
    try:
        (broken / "manifest.json").write_text("{}")
        assert ask(server.grpc_url, to_tensors("broken", SHORT))[0] == "INTERNAL"
    finally:
        (broken / "manifest.json").unlink()
        broken.rmdir()
    client.edit("toy", SHORT)


@pytest.mark.parametrize("name", ["grpc_port", "http_port", "metrics_port"])
def test_a_port_that_is_taken_is_named(repository, name):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(InputError, match=f"{name.replace('_', ' ')} {port} on 127.0.0.1 cannot be taken"):
            Server(replace(on_free_ports(repository), **{name: port}))


SLOW_TO_OPEN = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

class Ok(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

port = {name: int(value) for name, _, value in (option.partition("=") for option in sys.argv) if name.endswith("-port")}
Thread(target=ThreadingHTTPServer(("127.0.0.1", port["--http-port"]), Ok).serve_forever).start()
time.sleep(1)
ThreadingHTTPServer(("127.0.0.1", port["--metrics-port"]), Ok).serve_forever()
"""


def test_a_bare_server_is_ready_when_its_metrics_answer_too(tmp_path):
    """Triton opens that port last; a health check that came between the two would find nothing."""
    program = tmp_path / "tritonserver"
    program.write_text(f"#!{sys.executable}\n{SLOW_TO_OPEN}")
    program.chmod(0o755)
    write_model_files(tmp_path)
    with (
        Server(on_free_ports(tmp_path, tritonserver=program, direct=True)) as server,
        urllib.request.urlopen(server.metrics_url, timeout=5) as answer,
    ):
        assert answer.status == 200


def test_a_folder_that_is_no_repository_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a model repository"):
        Server(on_free_ports(tmp_path))


def test_a_model_that_does_not_load_is_the_reason(triton_installed, tmp_path, monkeypatch):
    write_model_files(tmp_path)
    monkeypatch.setattr(model_files, "MODEL_PY", "raise ImportError('this model is broken')\n")
    with pytest.raises(ServerDied, match=r"did not start: failed to load.*this model is broken"):
        Server(on_free_ports(tmp_path))


@pytest.fixture
def serving(repository):
    """`tav-opt serve` as a process of its own, and its gRPC address."""
    code = "import sys; from tav_opt.cli import main; sys.exit(main(sys.argv[1:]))"
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--restarts", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--repository", repository, *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    shown = [process.stdout.readline().split() for _ in range(4)]
    assert [line[0] for line in shown] == ["ready", "gRPC", "HTTP", "metrics"], process.communicate()
    yield process, shown[1][1]
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_edit_in_flight_end(serving, number):
    process, url = serving

    def tell(_stage: str, step: int, _steps: int) -> None:
        if step == 1:
            process.send_signal(number)

    with Client(url) as client:
        assert client.edit("toy", replace(SHORT, steps=200), on_progress=tell).frames.shape == (1, 4, 64, 64, 3)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_the_reason_is_told_when_the_server_dies(serving):
    process, _url = serving
    running = triton(process)
    workers = running.children()
    running.kill()
    assert psutil.wait_procs(workers, timeout=30)[1] == [], "the worker outlived its server"
    assert process.stdout.readline().startswith("ready")
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "tav-opt serve: tritonserver died: killed by SIGKILL" in errors


def test_nothing_is_left_of_a_stopped_server(repository):
    with Server(on_free_ports(repository)) as running:
        workers = psutil.Process(running.process.pid).children()
        folder = Path(running._folder.name)
        assert workers
        assert folder.is_dir()
    assert not folder.exists()
    assert psutil.wait_procs(workers, timeout=30)[1] == []
