"""`tav-opt serve` and the real server: a dead worker is noticed and replaced, a busy one left alone."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import supervised
from supervised import CLIP, SHORT

from tav_opt import cli
from tav_opt.client import Client, Retry, ServerError
from tav_opt.serving.server import Server

PATIENT = Retry(attempts=60, longest_pause_s=1.0)
LONG = replace(SHORT, steps=1000)


@pytest.fixture(scope="module")
def repository(golden, tmp_path_factory):
    return supervised.repository(golden, tmp_path_factory.getbasetemp())


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("tav-opt-*")}


def kill_amid(url: str, harm) -> ServerError:
    """Harms the server once an edit has begun → what its client is told."""
    with Client(url) as client, pytest.raises(ServerError) as caught:
        client.edit(CLIP, LONG, on_progress=lambda _stage, step, _steps: harm() if step == 3 else None)
    return caught.value


def test_a_worker_killed_amid_an_edit_is_replaced(repository):
    before = shared_memory()
    with supervised.serving(repository) as run:
        with Client(run.urls["gRPC"], retry=PATIENT) as client:
            expected = client.edit(CLIP, SHORT).frames
            (worker, *_) = old = supervised.workers(run.process)
            error = kill_amid(run.urls["gRPC"], worker.kill)
            # The edit that began is lost and its client told; one that comes now is served, by the same address.
            assert error.status in ("INTERNAL", "UNAVAILABLE", "CANCELLED"), error
            np.testing.assert_array_equal(client.edit(CLIP, SHORT).frames, expected)
        assert run.ready() == run.urls
        # Triton itself aborts where the worker held a lock of the memory that they share.
        reasons = ("tav-opt serve: a worker process died\n", "tav-opt serve: tritonserver died: killed by SIGABRT\n")
        assert any(reason in run.errors for reason in reasons), run.errors
        assert run.restarts() == 1
        assert not any(process.is_running() for process in old), "a worker of the old server is left"
        run.process.send_signal(signal.SIGTERM)
        assert run.ended() == 0
    assert shared_memory() <= before, "the killed server left its shared memory"


def test_a_worker_that_stands_still_is_found_by_the_probe(repository):
    """Its process is there, so that only a request shows what is wrong."""
    with supervised.serving(repository, "--probe-seconds", "0.5") as run:
        (worker, *_) = supervised.workers(run.process)
        worker.suspend()
        with Client(run.urls["gRPC"], retry=PATIENT) as client:
            client.edit(CLIP, SHORT)
        assert run.ready() == run.urls
        assert any("the server edits no more: " in line and "is not healthy" in line for line in run.errors), run.errors


@pytest.mark.full
def test_a_server_that_dies_again_and_again_is_given_up(repository):
    with supervised.serving(repository, "--restarts", "1") as run:
        for expected in (1, 1):
            (tritonserver,) = psutil.Process(run.process.pid).children()
            tritonserver.kill()
            if run.restarts() < expected:
                run.ready()
        assert run.ended() == 1
        assert run.restarts() == 1
        assert run.errors.count("tav-opt serve: tritonserver died: killed by SIGKILL\n") == 2


def test_a_busy_worker_is_not_a_dead_one(repository):
    """Probes twice a second while edits run and wait: none is disturbed and the queue keeps its places."""
    with supervised.serving(repository, "--probe-seconds", "0.5") as run:
        url = run.urls["gRPC"]
        with Client(url, retry=Retry(attempts=1)) as client, ThreadPoolExecutor(17) as pool:
            begun = threading.Event()
            first = pool.submit(client.edit, CLIP, replace(SHORT, steps=200), on_progress=lambda *_: begun.set())
            assert begun.wait(60)
            time.sleep(2)  # a probe now waits in the queue
            waiting = [pool.submit(client.edit, CLIP, replace(SHORT, seed=seed)) for seed in range(15)]
            for future in [first, *waiting]:
                assert future.result(120).frames.shape[0] == 1
        assert run.restarts() == 0, run.errors
        assert not any("tav-opt-probe" in line for line in run.errors), "probes fill the log"


def test_the_commands_that_check_health(repository, capsys):
    """What a container runs: alive and busy are 0, dead is 1, though Triton calls itself ready."""
    with Server(supervised.on_free_ports(repository)) as server:
        urls = ["--http-url", server.http_url, "--metrics-url", server.metrics_url]

        def check(*options: str) -> tuple[int, str]:
            return cli.main(["probe", *urls, *options]), capsys.readouterr().out

        assert check() == (0, "alive: the worker answered\n")
        with Client(server.grpc_url) as client, client.stream(CLIP, LONG) as stream:
            next(stream)
            for words in ("an edit has been running", "requests wait (1)", "requests wait (1)"):
                status, shown = check("--timeout", "0.5")
                assert (status, shown[:6]) == (0, "busy: ")
                assert words in shown, "probes pile up in the queue"
        assert not server.lost_a_worker()
        supervised.workers(server.process)[0].kill()
        status, shown = check()
        assert status == 1
        assert shown.startswith("dead: ")
        assert cli.main(["probe", *urls]) == 1
        assert server.lost_a_worker()
