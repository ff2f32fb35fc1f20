"""Tuning that is interrupted, and tuning that goes on after its end: the same weights, bit for bit, as in one go."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tav_opt import checkpoint, cli, tuning, tuning_state
from tav_opt.command import Interrupted
from tav_opt.config import InputError, TrainConfig
from tav_opt.files import read_json
from tav_opt.memory import eager
from tav_opt.video import Clip, write

PROMPT = "a panda is skiing"
QUICK = TrainConfig(steps=4, lr=1e-3, save_every=50, inversion_steps=2)
KEPT = replace(QUICK, keep_state=True)
CLIP = Clip(frames=np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8), fps=8.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def signals_arrive() -> Iterator[None]:
    """A shell starts what runs in the background with signals ignored, which tuning respects."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def base(golden: Path) -> str:
    return str(golden / "reference_checkpoint" / "sd")


def tuned(base: str, out: Path, config: TrainConfig, on_step: tuning.OnStep | None = None) -> list[tuple[str, int]]:
    """Tunes, and returns the stages and steps that were run."""
    seen: list[tuple[str, int]] = []

    def note(stage: str, step: int, steps: int, loss: float) -> None:
        seen.append((stage, step))
        if on_step is not None:
            on_step(stage, step, steps, loss)

    tuning.tune(base, CLIP, PROMPT, config, out, on_step=note)
    return seen


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (checkpoint.VALUES, checkpoint.LATENTS, "loss.csv")}


@pytest.fixture(scope="module")
def in_one_go(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Four steps without a stop."""
    out = tmp_path_factory.mktemp("whole") / "ckpt"
    tuned(base, out, QUICK)
    return files(out)


def sent(number: int, at: tuple[str, int], times: int = 1) -> tuning.OnStep:
    def on_step(stage: str, step: int, steps: int, loss: float) -> None:
        if (stage, step) == at:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return on_step


def test_convolutions_train_and_go_on(base, tmp_path):
    """Channels come last in their memory, and in that of their moments, which no file keeps."""
    config, whole, out = replace(QUICK, trainable=("conv1",)), tmp_path / "whole", tmp_path / "ckpt"
    tuned(base, whole, config)
    with pytest.raises(Interrupted):
        tuned(base, out, config, sent(signal.SIGINT, ("tune", 2)))
    tuned(base, out, config)
    assert files(out) == files(whole)
    assert {value.ndim for name, value in checkpoint.load(out).values.items() if ".conv1.weight" in name} == {4}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_state_between_two_steps(base, tmp_path, in_one_go, number):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    out = tmp_path / "ckpt"
    with pytest.raises(Interrupted, match=r"ckpt keeps the state after step 2, from which the same command goes on$"):
        tuned(base, out, QUICK, sent(number, ("tune", 2)))
    assert {number: signal.getsignal(number) for number in before} == before
    assert [path.name for path in out.iterdir()] == [tuning_state.STATE]
    assert tuned(base, out, QUICK) == [("tune", 3), ("tune", 4), ("invert", 1), ("invert", 2)]
    assert files(out) == in_one_go


def test_a_signal_within_a_step_lets_it_end(base, tmp_path, in_one_go, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    calls: list[int] = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:  # between backward and the optimiser
            os.kill(os.getpid(), signal.SIGINT)
        return clip(*arguments)

    out = tmp_path / "ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
        with pytest.raises(Interrupted, match="after step 2"):
            tuned(base, out, QUICK)
    assert tuned(base, out, QUICK)[0] == ("tune", 3)
    assert files(out) == in_one_go


def test_a_second_ctrl_c_ends_at_once_and_the_last_state_stands(base, tmp_path, in_one_go):
    out = tmp_path / "ckpt"
    with pytest.raises(KeyboardInterrupt) as nothing_kept:
        tuned(base, out, QUICK, sent(signal.SIGINT, ("tune", 1), times=2))
    assert not isinstance(nothing_kept.value, Interrupted) and not out.exists()
    with pytest.raises(Interrupted, match="after step 2"):
        tuned(base, out, replace(QUICK, save_every=2), sent(signal.SIGINT, ("tune", 3), times=2))
    assert tuned(base, out, QUICK)[0] == ("tune", 3)
    assert files(out) == in_one_go


def test_a_signal_after_the_last_step_or_in_a_preview_loses_nothing(base, tmp_path, in_one_go, monkeypatch):
    out = tmp_path / "ckpt"
    config = replace(QUICK, preview_every=2, preview_prompts=("a dog",))
    preview = tuning._Run.preview

    def interrupted(self, step, stop):
        os.kill(os.getpid(), signal.SIGINT)
        preview(self, step, stop)

    with monkeypatch.context() as patch:
        patch.setattr(tuning._Run, "preview", interrupted)
        with pytest.raises(Interrupted, match="after step 2"):
            tuned(base, out, config)
    assert not (out / "previews").exists()
    with pytest.raises(Interrupted, match="after step 4"):
        tuned(base, out, QUICK, sent(signal.SIGINT, ("invert", 1)))
    assert tuned(base, out, QUICK) == [("invert", 1), ("invert", 2)]
    assert files(out) == in_one_go


def test_the_command_says_where_it_goes_on(base, tmp_path, capsys, monkeypatch):
    write(tmp_path / "clip.mp4", CLIP.frames, 8)
    step = tuning.train_step

    def interrupted(training, *rest):
        os.kill(os.getpid(), signal.SIGINT)
        return step(training, *rest)

    monkeypatch.setattr(tuning, "train_step", interrupted)
    options = "--frames 2 --stride 1 --height 32 --width 32 --steps 3 --inversion-steps 2 --prompt x".split()
    given = ["tune", "--model", base, "--video", str(tmp_path / "clip.mp4"), "--out", str(tmp_path / "ckpt"), *options]
    assert cli.main(given) == 130
    error = capsys.readouterr().err
    where = f"interrupted: {tmp_path / 'ckpt'} keeps the state after step 1, from which the same command goes on\n"
    assert error.splitlines(keepends=True)[-1] == f"tav-opt tune: {where}"
    monkeypatch.setattr(tuning, "train_step", step)
    assert cli.main(given) == 0
    assert cli.main([*given[:-8], "--steps", "5", *given[-6:]]) == 2
    assert "--keep-state" in capsys.readouterr().err


def test_a_finished_run_goes_on_to_more_steps(base, tmp_path, in_one_go):
    out = tmp_path / "ckpt"
    tuned(base, out, replace(KEPT, steps=2))
    assert (out / tuning_state.STATE).exists() and checkpoint.load(out)
    with pytest.raises(InputError, match=r"holds a run of 2 steps: give more --steps"):
        tuned(base, out, replace(KEPT, steps=2))
    with pytest.raises(InputError, match=r"lr 0\.001, not 0.002"):
        tuned(base, out, replace(KEPT, lr=2e-3))
    with pytest.raises(Interrupted, match="after step 3"):
        tuned(base, out, KEPT, sent(signal.SIGINT, ("tune", 3)))
    assert checkpoint.load(out), "that of two steps, as long as there is none of more"
    with pytest.raises(InputError, match=r"holds a run of 3 steps: give more --steps"):
        tuned(base, out, replace(KEPT, steps=2))
    assert tuned(base, out, QUICK) == [("tune", 4), ("invert", 1), ("invert", 2)]
    assert files(out) == in_one_go and not (out / tuning_state.STATE).exists()
    with pytest.raises(InputError, match=r"finished checkpoint: choose another --out .*--keep-state"):
        tuned(base, out, replace(QUICK, steps=6))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_rate_that_depends_on_the_steps_keeps_them(base, tmp_path, schedule):
    config = replace(KEPT, steps=1, schedule=schedule)
    tuned(base, tmp_path / "ckpt", config)
    words = rf"steps 1, not 2 \(the {schedule} learning rate depends on them\)"
    with pytest.raises(InputError, match=words):
        tuned(base, tmp_path / "ckpt", replace(config, steps=2))
    assert checkpoint.load(tmp_path / "ckpt")


def test_killed_while_a_longer_run_replaces_a_finished_one(base, tmp_path, in_one_go, monkeypatch):
    out = tmp_path / "ckpt"
    tuned(base, out, replace(KEPT, steps=2))

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", killed)  # the new values are there, their description is not
        with pytest.raises(Killed):
            tuned(base, out, QUICK)
    assert not checkpoint.is_checkpoint(out)
    assert tuned(base, out, QUICK) == [("invert", 1), ("invert", 2)]
    assert files(out) == in_one_go


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough with gradient checkpointing alone."""
    estimate = eager.estimate_tuning
    monkeypatch.setattr(eager, "free_bytes", lambda device: 2**40)
    monkeypatch.setattr(
        eager,
        "estimate_tuning",
        lambda sd, config, *size: estimate(sd, config, *size) + 2**50 * (not config.gradient_checkpointing),
    )


OPTIONS = "--frames 2 --stride 1 --height 32 --width 32 --steps 2 --inversion-steps 2 --prompt x --keep-state".split()


@pytest.mark.parametrize(
    "switch, kept",
    [(["auto"], True), (["--steps", "1"], True), (["off"], None), (["maybe"], None)],
    ids=str,
)
def test_the_command_chooses_gradient_checkpointing(base, tmp_path, capsys, caplog, little_memory, switch, kept):
    """Unless told; what it has chosen stands in the checkpoint, and one line says so."""
    write(tmp_path / "clip.mp4", CLIP.frames, 8)
    given = ["tune", "--model", base, "--video", str(tmp_path / "clip.mp4"), "--out", str(tmp_path / "ckpt"), *OPTIONS]
    try:
        status = cli.main([*given, "--gradient-checkpointing", *switch])
    except SystemExit as end:  # of tyro
        status = end.code
    error = capsys.readouterr().err
    if kept is None:
        assert status == 2 and not (tmp_path / "ckpt").exists()
        assert "try gradient checkpointing or fewer" in error or "invalid choice 'maybe'" in error
        return
    assert status == 0
    assert read_json(tmp_path / "ckpt" / "checkpoint.json")["settings"]["gradient_checkpointing"] is kept
    said = "gradient checkpointing is on: without it tuning needs about 1048576.1 GiB, cpu has 1024.0 GiB"
    assert [record.getMessage() for record in caplog.records] == ([said] if switch == ["auto"] else [])


def test_a_run_goes_on_with_the_gradient_checkpointing_that_it_began_with(base, tmp_path, monkeypatch, little_memory):
    """Whatever memory is free then; by the same steps, which round alike on a processor."""
    out, config = tmp_path / "ckpt", replace(KEPT, steps=2)
    tuned(base, out, config)
    monkeypatch.setattr(eager, "free_bytes", lambda device: 2**60)
    tuned(base, out, KEPT)
    assert read_json(out / "checkpoint.json")["settings"]["gradient_checkpointing"] is True
    with pytest.raises(InputError, match="a run with gradient_checkpointing True, not False"):
        tuned(base, out, replace(KEPT, steps=5, gradient_checkpointing=False))
