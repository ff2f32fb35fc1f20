"""`tav-opt serve` and the real server: a dead worker is noticed and replaced, a busy one left alone."""

from __future__ import annotations

import re
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
from served import until
from supervised import CLIP, SHORT

from tav_opt import cli
from tav_opt.client import Client, Retry, ServerError
from tav_opt.serving.gateway.pages import HEALTH_SECONDS
from tav_opt.serving.host.server import Server

PATIENT = Retry(attempts=60, longest_pause_s=1.0)
LONG = replace(SHORT, steps=1000)


@pytest.fixture(scope="module")
def repository(golden, tmp_path_factory):
    return supervised.repository(golden, tmp_path_factory.getbasetemp())


def shared_memory(tritonserver: psutil.Process) -> Path:
    """What the names of a server's regions begin with: others may run beside."""
    (option,) = (word for word in tritonserver.cmdline() if "shm-region-prefix-name=" in word)
    return Path("/dev/shm") / option.partition("shm-region-prefix-name=")[2]


def regions(prefix: Path) -> list[Path]:
    return list(prefix.parent.glob(f"{prefix.name}*"))


def kill_amid(url: str, harm) -> ServerError:
    """Harms the server once an edit has begun → what its client is told."""
    with Client(url) as client, pytest.raises(ServerError) as caught:
        client.edit(CLIP, LONG, on_progress=lambda _stage, step, _steps: harm() if step == 3 else None)
    return caught.value


def test_a_worker_killed_amid_an_edit_is_replaced(repository):
    with supervised.serving(repository) as run:
        prefixes = [shared_memory(supervised.triton(run.process))]
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
        prefixes.append(shared_memory(supervised.triton(run.process)))
        assert regions(prefixes[1]) and not regions(prefixes[0]), "the killed server left its shared memory"
        run.process.send_signal(signal.SIGTERM)
        assert run.ended() == 0
    assert not regions(prefixes[1])


def test_a_worker_that_stands_still_is_found_by_the_probe(repository):
    """Its process is there, so that only a request shows what is wrong."""
    with supervised.serving(repository, "--probe-seconds", "0.5") as run:
        (worker, *_) = supervised.workers(run.process)
        worker.suspend()
        with Client(run.urls["gRPC"], retry=PATIENT) as client:
            client.edit(CLIP, SHORT)
        assert run.ready() == run.urls
        assert any("the server edits no more: " in line and "is not healthy" in line for line in run.errors), run.errors


def test_a_server_that_dies_again_and_again_goes_on_after_a_pause(repository):
    """A stranger who can make it die shall not be able to end it."""
    with supervised.serving(repository, "--restarts", "1") as run:
        for _ in range(3):
            supervised.triton(run.process).kill()
            assert run.ready() == run.urls
        with Client(run.urls["gRPC"]) as client:
            client.edit(CLIP, SHORT)
        told = [line for line in run.errors if "tav-opt serve: restart" in line]
        assert [line.partition(", in ")[2] for line in told] == ["", "2 s\n", "4 s\n"], told
        assert run.errors.count("tav-opt serve: tritonserver died: killed by SIGKILL\n") == 3


def test_a_server_that_has_grown_is_started_anew_between_two_edits(repository):
    """The edit that made it grow ends, the gateway stays, and no restart is counted. One that never edited is left."""
    with supervised.serving(repository, "--recycle-mib", "1") as run:
        old, (gateway,) = supervised.triton(run.process), gateways(run)
        until(lambda: any("MiB before its first edit: --recycle-mib 1 starts it" in line for line in list(run.errors)))
        with Client(run.urls["gRPC"], retry=PATIENT) as client:
            expected = client.edit(CLIP, SHORT).frames
            assert run.ready() == run.urls
            np.testing.assert_array_equal(client.edit(CLIP, SHORT).frames, expected)
        assert any("over --recycle-mib 1: it is started anew" in line for line in run.errors)
        assert not old.is_running() and gateways(run) == [gateway]
        assert run.restarts() == 0 and not any("died" in line for line in run.errors), run.errors


def gateways(run: supervised.Serving) -> list[psutil.Process]:
    return [
        child for child in psutil.Process(run.process.pid).children() if "tav_opt.serving.gateway" in child.cmdline()
    ]


@pytest.mark.parametrize("with_guard", [False, True])
def test_a_server_ends_with_its_host_however_it_ends(repository, with_guard):
    """SIGKILL leaves it no last word. Where its guard is killed too, the next start sweeps, and names it."""
    with supervised.serving(repository) as run:
        below = psutil.Process(run.process.pid).children(recursive=True)
        triton = supervised.triton(run.process)
        prefix = shared_memory(triton)
        assert regions(prefix)
        if with_guard:
            next(child for child in below if "guard.py" in " ".join(child.cmdline())).kill()
        run.process.kill()
        if with_guard:
            assert triton.is_running() and regions(prefix)
            with supervised.serving(repository) as another:
                until(lambda: any("swept" in line for line in list(another.errors)))
                (line,) = (line for line in another.errors if "swept" in line)
                assert f"process {run.process.pid} left tritonserver {triton.pid}, " in line
                psutil.wait_procs(below, timeout=20)
                left = {process for process in below if process.is_running()}
        else:
            left = set(psutil.wait_procs(below, timeout=20)[1])
        assert not left
    assert not regions(prefix)


def test_a_hang_up_lets_the_edit_in_flight_end(repository):
    with supervised.serving(repository) as run, Client(run.urls["gRPC"]) as client:

        def hang_up(_stage: str, step: int, _steps: int) -> None:
            if step == 1:
                run.process.send_signal(signal.SIGHUP)

        client.edit(CLIP, replace(SHORT, steps=100), on_progress=hang_up)
        assert run.ended() == 0


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
        assert any(re.match(r"tav-opt serve: base \S+: onnxruntime on cpu", line) for line in run.errors), run.errors


def test_the_commands_that_check_health(repository, capsys):
    """What a container runs: alive and busy are 0, dead is 1, though Triton calls itself ready."""
    with Server(supervised.on_free_ports(repository)) as server:
        urls = ["--metrics-url", server.metrics_url]

        def check(*options: str) -> tuple[int, str]:
            return cli.main(["probe", *urls, *options]), capsys.readouterr().out

        assert check() == (0, "alive: the worker answered\n")
        with Client(server.grpc_url) as client, client.stream(CLIP, LONG) as stream:
            next(stream)
            time.sleep(HEALTH_SECONDS)  # so long the last health is told again
            for _ in range(2):
                status, shown = check()
                assert (status, shown[:6]) == (0, "busy: ")
                assert "an edit has been running" in shown or "requests wait (1)" in shown, (
                    "probes pile up in the queue"
                )
        assert not server.lost_a_worker()
        supervised.workers(server.process)[0].kill()
        time.sleep(HEALTH_SECONDS)
        status, shown = check()
        assert status == 1
        assert shown.startswith("dead: ")
        assert cli.main(["probe", *urls]) == 1
        assert server.lost_a_worker()
