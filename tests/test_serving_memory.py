"""Instances of a server, processes of their own, do not promise the same memory twice."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from fakes import GIB, SHORT, FakeEngine, answered, editor

from tav_opt.config import WorkerConfig
from tav_opt.contract import to_tensors
from tav_opt.memory.promises import Memory
from tav_opt.serving import opening
from tav_opt.serving.failures import Unavailable


def test_a_promise_holds_for_the_others_until_its_end(tmp_path):
    first, second = (Memory(lambda: 100, tmp_path, name) for name in ("0", "1"))
    for needed in (30, 7):
        with first.promised(lambda needed=needed: first.free() and needed):
            assert second.free() == 100 - needed
            with second.promised(lambda: second.free()):
                assert Memory(lambda: 100, tmp_path, "2").free() == 0
        assert first.free() == second.free() == 100


def test_one_that_could_not_be_given_leaves_nothing(tmp_path):
    first, second = (Memory(lambda: 100, tmp_path, name) for name in ("0", "1"))
    with pytest.raises(ZeroDivisionError), first.promised(lambda: 1 // 0):
        pass
    with second.promised(lambda: second.free()):
        assert first.free() == 0


def test_a_promise_ends_with_its_process(tmp_path):
    code = f"""if True:
        import time
        from pathlib import Path
        from tav_opt.memory.promises import Memory
        with Memory(lambda: 100, Path({str(tmp_path)!r}), "0").promised(lambda: 30):
            print("promised", flush=True)
            time.sleep(60)
    """
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "promised\n"
    ours = Memory(lambda: 100, tmp_path, "1")
    assert ours.free() == 70
    other.kill()
    other.communicate()
    assert ours.free() == 100


class Held(FakeEngine):
    """Its edits go on when they are let."""

    def __init__(self, going_on: threading.Event) -> None:
        super().__init__()
        self.going_on = going_on

    def predict(self, latents, timestep, text):
        assert self.going_on.wait(60)
        return super().predict(latents, timestep, text)


def test_of_many_that_ask_at_once_as_many_are_served_as_there_is_memory_for(tmp_path):
    """Nothing has been allocated when they ask: what is free is the same for all."""
    ends, going_on, asked = [], threading.Event(), threading.Barrier(9)

    def ask(number: int) -> None:
        memory = Memory(lambda: 5 * GIB // 2, tmp_path, str(number))
        asked.wait(60)
        try:
            answered(editor(Held(going_on), memory=memory), to_tensors("toy", SHORT))
            ends.append("served")
        except Unavailable as error:
            assert "has 0.50 GiB free" in str(error)
            ends.append("refused")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    asked.wait(60)
    for thread in threads:
        thread.join(0.5)  # those that are refused
    assert ends == ["refused"] * 6
    going_on.set()
    for thread in threads:
        thread.join(60)
    assert ends == ["refused"] * 6 + ["served"] * 2


def test_several_instances_share_a_folder_and_one_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _count: None)  # of the tests, too
    troubles: list[str] = []
    for instances, folder in ((1, tmp_path), (2, tmp_path / "absent")):
        editor_, _ = opening.open_editor(
            folder, WorkerConfig(instances=instances), device=torch.device("cpu"), on_trouble=troubles.append
        )
        assert answered(editor(FakeEngine(), memory=editor_.memory), to_tensors("toy", SHORT))
    assert not list(tmp_path.iterdir())
    assert len(troubles) == 1 and "what memory they need" in troubles[0]
    opening.open_editor(tmp_path, WorkerConfig(instances=2), device=torch.device("cpu"), instance="0")
    assert [path.name for path in tmp_path.iterdir()] == [".memory-cpu"]
