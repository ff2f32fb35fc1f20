"""What workers tell the host that started them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
from served import until

from tav_opt.serving.host import supervisor
from tav_opt.serving.host_socket import VARIABLE, HostEnd, WorkerEnd


@pytest.fixture
def host(monkeypatch) -> HostEnd:
    end = HostEnd()
    monkeypatch.setenv(VARIABLE, str(end.workers.fileno()))
    return end


def idle(host: HostEnd) -> bool:
    """After all that was told has been read."""
    last = str(len(host.engines))
    WorkerEnd("last").opened(last, "")
    until(lambda: last in host.engines, 10)
    return host.idle_seconds() > 0


def test_the_host_is_idle_only_while_no_instance_has_a_request_in_hand(host):
    first, second = WorkerEnd("0"), WorkerEnd("1")
    assert not idle(host), "nothing is known yet"
    first.ready()
    second.ready()
    assert idle(host)
    with first.in_hand(probe=False):
        assert not idle(host)
        with second.in_hand(probe=False):
            assert not idle(host)
        assert not idle(host), "the last word was of another instance"
        with first.in_hand(probe=False):
            pass
        assert not idle(host)
    assert idle(host)
    with pytest.raises(ZeroDivisionError), first.in_hand(probe=False):
        raise ZeroDivisionError
    assert idle(host)


def test_a_host_knows_whether_it_was_asked_for_anything(host):
    worker = WorkerEnd("0")
    with worker.in_hand(probe=True):
        pass
    assert idle(host) and not host.has_taken, "its own probes do not count"
    with worker.in_hand(probe=False):
        until(lambda: host.has_taken, 5)


def test_the_engine_of_each_base_is_told(host):
    WorkerEnd("0").opened("b1", "onnxruntime on cpu; compiled: no programs")
    until(lambda: host.engines == {"b1": "onnxruntime on cpu; compiled: no programs"}, 5)


def test_a_worker_without_a_host_works_all_the_same(host, monkeypatch, tmp_path):
    worker = WorkerEnd("0")
    host.workers.close()
    host._socket.shutdown(socket.SHUT_RDWR)
    with worker.in_hand(probe=False):
        worker.ready()
    with (tmp_path / "file").open("w") as file, socket.socket() as other:
        for value in (str(file.fileno()), str(other.fileno()), "999999", "x", "-1", ""):
            monkeypatch.setenv(VARIABLE, value)
            WorkerEnd("0").ready()
    assert (tmp_path / "file").read_text() == ""
    monkeypatch.delenv(VARIABLE)
    WorkerEnd("0").ready()


def test_many_processes_tell_whole_messages_and_a_host_that_does_not_listen_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(HostEnd, "_listen", lambda self: None)
    host = HostEnd()
    code = """if True:
        from tav_opt.serving.host_socket import WorkerEnd
        worker = WorkerEnd("x" * 300)
        for _ in range(5000):
            with worker.in_hand(probe=False):
                pass
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, VARIABLE: str(host.workers.fileno())},
            pass_fds=[host.workers.fileno()],
        )
        for _ in range(2)
    ]
    assert [process.wait(60) for process in started] == [0, 0]
    host.workers.close()
    monkeypatch.undo()
    host._listen()  # to the end, since the last worker has gone
    assert host._in_hand.keys() == {"x" * 300}


class FakeServer:
    def __init__(self) -> None:
        self.told: list[str] = []

    def drain(self) -> None:
        self.told.append("drain")

    def kill(self) -> None:
        self.told.append("kill")


def test_signals_are_noted_and_acted_upon_by_another_thread():
    """The first drains and the second kills, also where the first came before there was a server."""
    for early in (False, True):
        server = FakeServer()
        with supervisor._Signals() as signals:
            if early:
                os.kill(os.getpid(), signal.SIGTERM)
                assert signals.asked
            signals.pass_on_to(server)  # type: ignore[arg-type]
            if not early:
                os.kill(os.getpid(), signal.SIGINT)
            until(lambda: "drain" in server.told, 5)  # noqa: B023
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: server.told[-1] == "kill", 5)  # noqa: B023
            assert [*dict.fromkeys(server.told)] == ["drain", "kill"], "to drain twice is to drain once"
