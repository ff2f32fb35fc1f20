"""The real server amid clients that vanish, crowd, mistrust or meddle."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import supervised
import trustme
from served import until
from supervised import CLIP, SHORT
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tav_opt.client import AsyncClient, Client, Retry, ServerError, Tls
from tav_opt.config import InputError
from tav_opt.contract import STREAM_MODEL
from tav_opt.serving.host.probe import probe
from tav_opt.serving.host.server import Server

LONG = replace(SHORT, steps=1000)
ONCE = Retry(attempts=1)


@pytest.fixture(scope="module")
def repository(golden, tmp_path_factory):
    return supervised.repository(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def server(repository):
    with Server(supervised.on_free_ports(repository)) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server):
    with Client(server.grpc_url) as client:
        return client.edit(CLIP, SHORT).frames


def test_refused_requests_between_edits_do_no_harm(server, expected):
    """Triton 2.51 dies of some ten of them where the client asks for their gRPC status."""
    bad = [("nowhere", SHORT), (CLIP, replace(SHORT, steps=0)), (CLIP, replace(SHORT, guidance_scale=float("nan")))]
    for number in range(60):
        with Client(server.grpc_url, retry=ONCE) as client:
            with pytest.raises((InputError, ServerError)):
                client.edit(*bad[number % len(bad)])
            np.testing.assert_array_equal(client.edit(CLIP, SHORT).frames, expected)
    assert server.process.poll() is None


def test_refused_edits_leave_no_socket_open(server):
    """Triton keeps a socket now and then when a call is cancelled just as it ends: 1 or 2 in 100 refusals."""

    async def refused(count: int) -> None:
        for _ in range(count):
            async with AsyncClient(server.grpc_url, retry=ONCE) as client:
                with pytest.raises(InputError):
                    await client.edit("nowhere", SHORT)

    asyncio.run(refused(20))
    before = psutil.Process(server.process.pid).num_fds()
    asyncio.run(refused(500))
    until(lambda: psutil.Process(server.process.pid).num_fds() <= before + 2, 10)


def test_a_client_killed_amid_its_edit_is_cancelled(server, expected):
    code = """if True:
        import sys
        from tav_opt.client import Client
        from tav_opt.config import EditConfig
        with Client(sys.argv[1]) as client:
            for progress in client.stream(sys.argv[2], EditConfig(prompts=("x",), steps=1000)):
                print(progress.step, flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", code, server.grpc_url, CLIP], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    server.log.clear()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    until(lambda: any("CANCELLED" in line for line in list(server.log)))
    with Client(server.grpc_url) as client:
        np.testing.assert_array_equal(client.edit(CLIP, SHORT).frames, expected)


def crowd(server: Server, clients: int, retry: Retry, expected: np.ndarray) -> Counter[str]:
    """How the edits of so many clients end, each on a connection of its own, who come while the worker is busy."""

    async def one() -> str:
        async with AsyncClient(server.grpc_url, retry=retry) as client:
            try:
                edit = await client.edit(CLIP, SHORT)
            except ServerError as error:
                return error.status
            return "right" if np.array_equal(edit.frames, expected) else "wrong"

    async def all_of_them() -> Counter[str]:
        return Counter(await asyncio.gather(*(one() for _ in range(clients))))

    with Client(server.grpc_url) as client, client.stream(CLIP, LONG) as running, ThreadPoolExecutor(1) as pool:
        next(running)
        future = pool.submit(asyncio.run, all_of_them())
        until(lambda: _pending(server) == 16)
        running.cancel()
        return future.result(300)


def test_two_hundred_clients_on_a_queue_of_sixteen(server, expected):
    ends = crowd(server, 200, ONCE, expected)
    assert set(ends) == {"right", "UNAVAILABLE"}, ends
    assert ends["right"] >= 16, ends
    assert probe(server.http_url, server.metrics_url).state == "alive"


@pytest.mark.full
def test_whoever_is_patient_is_served(server, expected):
    assert crowd(server, 40, Retry(attempts=400, longest_pause_s=1), expected) == {"right": 40}


def _pending(server: Server) -> int:
    with urllib.request.urlopen(server.metrics_url) as page:
        lines = page.read().decode().splitlines()
    name = f'nv_inference_pending_request_count{{model="{STREAM_MODEL}"'
    return next(int(line.split()[-1]) for line in lines if line.startswith(name))


def test_a_deadline_that_passes_in_the_queue(server, expected):
    with Client(server.grpc_url) as client, client.stream(CLIP, LONG) as running:
        next(running)
        with pytest.raises(ServerError) as caught:
            client.edit(CLIP, SHORT, deadline_s=0.5)
        assert caught.value.status == "DEADLINE_EXCEEDED"
        running.cancel()
        until(lambda: _pending(server) == 0)
        np.testing.assert_array_equal(client.edit(CLIP, SHORT).frames, expected)


def test_sigterm_lets_what_runs_and_what_waits_end(repository, expected):
    with supervised.serving(repository) as run, Client(run.urls["gRPC"], retry=ONCE) as client:
        with ThreadPoolExecutor(4) as pool:
            with client.stream(CLIP, replace(SHORT, steps=150)) as running:
                next(running)
                waiting = [pool.submit(client.edit, CLIP, SHORT) for _ in range(3)]
                until(lambda: _waits(run, 3))
                run.process.send_signal(signal.SIGTERM)
                assert len(running.result().frames) == 1
            for future in waiting:
                np.testing.assert_array_equal(future.result(60).frames, expected)
        assert run.ended() == 0
        assert run.restarts() == 0
        with pytest.raises(InputError, match="no server answers"):
            client.edit(CLIP, SHORT)


def _waits(run: supervised.Serving, count: int) -> bool:
    health = probe("http://127.0.0.1:9", run.urls["metrics"], timeout_s=0.01)
    return f"requests wait ({count})" in health.reason


# Trust.


def test_only_this_machine_is_listened_to(server):
    for process, ports in ((server.process, 2), (server.front.process, 4)):
        listening = [c for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"]
        assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}
        assert len({c.laddr.port for c in listening}) == ports


def post(url: str, body: dict) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (f"repository/models/{STREAM_MODEL}/unload", {}),
        (f"repository/models/{STREAM_MODEL}/load", {}),
        ("repository/index", {}),
        ("systemsharedmemory/region/x/register", {"key": "/REGION", "byte_size": 64, "offset": 0}),
        ("systemsharedmemory/unregister", {}),
        ("logging", {"log_verbose_level": 3}),
        ("trace/setting", {"trace_level": ["TENSORS"]}),
    ],
)
def test_nobody_administers_the_server_over_http(server, path, body):
    (region, *_) = [path.name for path in Path("/dev/shm").glob(f"{server._shared_memory}*")]
    body = json.loads(json.dumps(body).replace("REGION", region))
    status, text = post(f"{server.http_url}/v2/{path}", body)
    assert status == 403, text
    assert "restricted" in text


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name=STREAM_MODEL)),
        ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name=STREAM_MODEL)),
        ("RepositoryIndex", service_pb2.RepositoryIndexRequest()),
        ("SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=1)),
        ("LogSettings", service_pb2.LogSettingsRequest()),
        ("TraceSetting", service_pb2.TraceSettingRequest()),
    ],
)
def test_nobody_administers_the_server_over_grpc(server, method, request_):
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub, method)(request_, timeout=30)
    assert "restricted" in caught.value.details()


@pytest.mark.full
def test_without_the_restriction_models_could_not_be_unloaded_either(repository, server):
    """The model-control API itself is off: the restriction is the second lock."""
    with Server(supervised.on_free_ports(repository, direct=True)) as other:
        (option,) = [o for o in psutil.Process(other.process.pid).cmdline() if o.startswith("--http-restricted-api")]
        key, _, value = option.rpartition(":")[2].partition("=")
        url = f"{other.http_url}/v2/repository/models/{STREAM_MODEL}/unload"
        request = urllib.request.Request(url, b"{}", {key: value})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        assert "explicit model load / unload is not allowed" in caught.value.read().decode()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """PEM files of an authority, a server and a client that it vouches for, and a client of another authority."""
    folder = tmp_path_factory.mktemp("tls")
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, issued in (
        ("server", authority.issue_cert("localhost", "127.0.0.1")),
        ("client", authority.issue_cert("client@example.org")),
        ("stranger", other.issue_cert("client@example.org")),
    ):
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        for blob in issued.cert_chain_pems:
            blob.write_to_path(folder / f"{name}.pem", append=True)
    return folder


def test_mutual_tls(repository, certificates, expected):
    config = supervised.on_free_ports(
        repository,
        tls_certificate=certificates / "server.pem",
        tls_key=certificates / "server.key",
        tls_client_ca=certificates / "ca.pem",
    )

    def tls(name: str) -> Tls:
        return Tls(
            root_certificates=certificates / "ca.pem",
            certificate=certificates / f"{name}.pem",
            key=certificates / f"{name}.key",
        )

    with Server(config) as secured:
        with Client(secured.grpc_url, tls=tls("client")) as client:
            np.testing.assert_array_equal(client.edit(CLIP, SHORT).frames, expected)
        for refused in (None, Tls(root_certificates=certificates / "ca.pem"), tls("stranger")):
            with Client(secured.grpc_url, tls=refused, retry=ONCE) as client, pytest.raises(InputError):
                client.edit(CLIP, SHORT)
        assert secured.http_url.startswith("https://")
        for name, status in (("client", 200), ("stranger", None)):
            trust = ssl.create_default_context(cafile=certificates / "ca.pem")
            trust.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
            assert ready(secured.http_url, trust) == status
        health = json.loads(urllib.request.urlopen(secured.metrics_url.replace("metrics", "health")).read())
        assert health["state"] == "alive", "the probe needs no certificate"


def ready(url: str, trust: ssl.SSLContext) -> int | None:
    """The status of the server's readiness; None where it does not speak with such a client."""
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=10, context=trust) as answer:
            return answer.status
    except OSError:
        return None


@pytest.mark.full
def test_the_command_line_speaks_tls(repository, certificates, tmp_path, expected):
    options = ["--tls-certificate", certificates / "server.pem", "--tls-key", certificates / "server.key"]
    with supervised.serving(repository, *map(str, options)) as run:
        asked = ["--url", run.urls["gRPC"], "--clip", CLIP, "--prompt", SHORT.prompts[0], "--attempts", "1"]
        asked += ["--steps", "2", "--guidance", "7.5", "--out", str(tmp_path / "edit")]
        command = [sys.executable, "-c", "import sys; from tav_opt.cli import main; sys.exit(main(sys.argv[1:]))"]
        shown = subprocess.run(
            [*command, "request", *asked, "--root-certificates", certificates / "ca.pem"],
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, shown.stderr
        assert len(os.listdir(tmp_path / "edit")) == expected.shape[1]
        refused = subprocess.run([*command, "request", *asked], capture_output=True, text=True)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tls_certificate": Path("x.pem")}, "go together"),
        ({"tls_client_ca": Path("ca.pem")}, "needs the server's own certificate"),
        ({"tls_certificate": Path("nowhere.pem"), "tls_key": Path("nowhere.key")}, "nowhere.pem does not exist"),
    ],
)
def test_half_a_tls_configuration_is_refused(repository, settings, words):
    with pytest.raises(InputError, match=words):
        Server(supervised.on_free_ports(repository, **settings))
