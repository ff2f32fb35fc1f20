"""Edits in hand together: each gets what it would get alone, whatever becomes of the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import GIB, SHORT, FakeEngine, Stop, answered, editor
from served import until

from tav_opt import ddim
from tav_opt.config import EditConfig
from tav_opt.contract import to_tensors
from tav_opt.memory.promises import Memory
from tav_opt.serving.batching import Batches
from tav_opt.serving.edits import Editor
from tav_opt.serving.failures import Unavailable
from tav_opt.serving.inversions import Inversions


class Rows(FakeEngine):
    """What it predicts of a row depends on that row's latents, timestep and text; its frames show its latents."""

    def __init__(self, revision: str = "r1") -> None:
        super().__init__()
        self.revision = revision
        self.hold: Callable[[], object] = lambda: None
        """Called amid the first call of the network."""
        self.source_latents = torch.rand((1, 4, 2, 2, 2), generator=torch.Generator().manual_seed(3)) - 0.5
        self.inverted_latents = self.source_latents.flip(1)

    def encode_text(self, prompts):
        return torch.stack([torch.full((3, 2), len(prompt) / 50) for prompt in prompts])

    def predict(self, latents, timestep, text):
        if not self.batches:
            self.hold()
        super().predict(latents, timestep, text)
        time = torch.as_tensor(timestep).expand(len(latents)) / 1000
        return (latents.abs() + text[:, :1, :1, None, None] - time[:, None, None, None, None]).sin()

    def decode(self, latents, on_part=lambda: None):
        on_part()
        pixels = (latents[:, :3].clamp(-4, 4) * 30 + 128).round().to(torch.uint8).movedim(1, -1)
        return pixels.repeat_interleave(4, 2).repeat_interleave(4, 3).numpy()


def run(pool: ThreadPoolExecutor, ours: Editor, config: EditConfig = SHORT, go_on=lambda: None, **sent) -> Future:
    return pool.submit(answered, ours, to_tensors("toy", config, **sent), go_on)


def frames(answer) -> np.ndarray:
    return answer[0][-1]["frames"]


def waiting(ours: Editor) -> int:
    return sum(len(group._waiting) for group in list(ours.batches._groups.values()))


OTHERS = {
    "the same": SHORT,
    "steps": replace(SHORT, steps=5),
    "guidance scale": replace(SHORT, guidance_scale=3.0),
    "no guidance": replace(SHORT, guidance_scale=1.0),
    "negative prompt": replace(SHORT, negative_prompt="fog"),
    "eta": replace(SHORT, eta=0.7, seed=9),
    "prompts": replace(SHORT, prompts=("a cat", "two of them")),
    "noise": replace(SHORT, inversion=False, seed=5),
    "inverted anew": replace(SHORT, inversion_steps=4),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_edits_of_one_clip_share_calls_and_get_what_they_would_get_alone(other):
    engine = Rows()
    ours = editor(engine)
    engine.hold = lambda: until(lambda: waiting(ours) == 1)
    with ThreadPoolExecutor(2) as pool:
        first = run(pool, ours)
        until(lambda: any(group._members for group in ours.batches._groups.values()))
        second = run(pool, ours, other)
    for config, found in ((SHORT, first.result()), (other, second.result())):
        np.testing.assert_array_equal(frames(found), frames(answered(editor(Rows()), to_tensors("toy", config))))
        assert found[1].together == 2
    rows = [2, (2 - (other.guidance_scale == 1)) * len(other.prompts)]
    if other.inversion_steps is None:
        assert engine.batches[:2] == [2, sum(rows)], "the first waits for none, and then the other has joined"
    assert not ours.batches._groups and not ours.batches._prompts.total()


def test_edits_of_two_clips_share_no_call():
    engines = {name: Rows(revision=name) for name in ("one", "two")}
    ours = editor(None, clips=engines.__getitem__)
    meet = threading.Barrier(2)
    for engine in engines.values():
        engine.hold = lambda: meet.wait(60)  # each amid its call, and none waits for the other's
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(answered, ours, to_tensors(name, SHORT)) for name in engines]
    assert [future.result()[1].together for future in found] == [1, 1]
    assert [engine.batches for engine in engines.values()] == [[2] * SHORT.steps] * 2


@pytest.mark.parametrize("error", [ddim.Stopped(), ValueError("broken")])
def test_one_that_stops_leaves_at_that_step_and_the_others_go_on(error):
    engine = Rows()
    ours = editor(engine)
    engine.hold = lambda: until(lambda: waiting(ours) == 2)
    long = replace(SHORT, steps=6)
    with ThreadPoolExecutor(3) as pool:
        futures = [run(pool, ours, long), run(pool, ours, long, Stop(3, error)), run(pool, ours, long)]
    with pytest.raises(type(error)):
        futures[1].result()
    expected = frames(answered(editor(Rows()), to_tensors("toy", long)))
    for kept in (futures[0], futures[2]):
        np.testing.assert_array_equal(frames(kept.result()), expected)
        assert [int(a["step"][0]) for a in kept.result()[0]] == [1, 2, 3, 4, 5, 6, 6], "every step was told of"
    assert max(engine.batches) == 6, "all three shared a call"
    assert sum(engine.batches) == 2 * (6 + 3 + 6), "it stopped after its third step"


class Picky(Rows):
    """Cannot do what holds a long text."""

    def predict(self, latents, timestep, text):
        if (text > 1).any():
            self.batches.append(-len(latents))
            raise RuntimeError("a text is too much")
        return super().predict(latents, timestep, text)


def test_what_fails_for_one_does_not_fail_the_others():
    engine, troubles = Picky(), []
    ours = editor(engine, batches=Batches(troubles.append))
    engine.hold = lambda: until(lambda: waiting(ours) == 1)
    with ThreadPoolExecutor(2) as pool:
        good = run(pool, ours)
        until(lambda: any(group._members for group in ours.batches._groups.values()))
        bad = run(pool, ours, replace(SHORT, prompts=("x" * 60,)))
    with pytest.raises(RuntimeError, match="a text is too much"):
        bad.result()
    np.testing.assert_array_equal(frames(good.result()), frames(answered(editor(Rows()), to_tensors("toy", SHORT))))
    assert engine.batches[:2] == [2, -4] and sorted(engine.batches[2:4]) == [-2, 2] and engine.batches[4:] == [2]
    assert len(troubles) == 1 and "2 edits in one batch failed" in troubles[0]


def test_edits_that_ask_for_one_inversion_do_not_wait_for_each_other_for_ever():
    """Whoever waits for another's inversion takes part in no call: that would wait for it."""
    ours = editor(Rows())
    with ThreadPoolExecutor(8) as pool:
        futures = [run(pool, ours, replace(SHORT, inversion_steps=3)) for _ in range(8)]
    reports = [future.result(60)[1] for future in futures]
    assert sorted(report.inversion for report in reports) == ["computed"] + ["memory"] * 7


def test_joined_edits_promise_the_memory_that_they_take_together(tmp_path):
    """A GiB a prompt, and three free: a third edit is not let in beside two of two prompts and one."""
    engine = Rows()
    ours = editor(engine, memory=Memory(lambda: 3 * GIB, tmp_path, "0"))
    let = threading.Event()
    engine.hold = lambda: let.wait(60)
    with ThreadPoolExecutor(2) as pool:
        inside = [run(pool, ours, replace(SHORT, prompts=prompts)) for prompts in (("a", "b"), ("c",))]
        until(lambda: ours.batches.prompts(engine) == 3)
        with pytest.raises(Unavailable, match=r"has 0\.00 GiB free"):
            answered(ours, to_tensors("toy", SHORT))
        let.set()
    assert [frames(future.result()).shape[0] for future in inside] == [2, 1]
    assert answered(ours, to_tensors("toy", SHORT))


def test_an_edit_of_a_larger_batch_promises_what_it_adds_to_it(tmp_path):
    """Where the first prompt costs more than the next ones do, an edit alone must still fit when the others end."""
    engine = Rows()
    engine.extra_bytes = lambda prompts, **_: (4 + prompts) * GIB  # type: ignore[method-assign]
    memory = Memory(lambda: 11 * GIB, tmp_path, "0")
    ours = editor(engine, memory=memory)
    let = threading.Event()
    engine.hold = lambda: let.wait(60)
    with ThreadPoolExecutor(2) as pool:
        for edits, left in (1, 6), (2, 1):
            run(pool, ours)
            until(lambda left=left: memory.free() // GIB == left)  # promised once it has joined the batch
            assert ours.batches.prompts(engine) == edits
        let.set()


def test_threads_promise_in_files_of_their_own(tmp_path):
    ours, other = Memory(lambda: 100, tmp_path, "0"), Memory(lambda: 100, tmp_path, "1")
    with ours.promised(lambda: 30), ours.promised(lambda: 20):
        assert ours.free() == other.free() == 50
    with ours.promised(lambda: 5):
        assert other.free() == 95
    assert other.free() == 100
    assert len(list(tmp_path.glob("*.promise"))) == 2


@pytest.mark.parametrize("on_disk", [False, True])
def test_of_threads_that_ask_for_one_inversion_one_computes_it(tmp_path, on_disk):
    kept = Inversions(memory_limit=GIB, folder=tmp_path if on_disk else None, disk_limit=GIB)
    computed = []

    def compute() -> torch.Tensor:
        computed.append(1)
        time.sleep(0.1)
        return torch.ones(3)

    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(kept.get, "a", compute) for _ in range(4)]]
        assert kept.get("b", lambda: torch.zeros(3))[1] == "computed"
    assert len(computed) == 1 and all(torch.equal(latents, torch.ones(3)) for latents, _ in found)
    with pytest.raises(ZeroDivisionError):
        kept.get("c", lambda: 1 // 0)
    assert kept.get("c", lambda: torch.zeros(3))[1] == "computed", "who failed stands in nobody's way"
