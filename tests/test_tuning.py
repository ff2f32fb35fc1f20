"""Tuning against the reference's ten golden steps, diffusers' schedules, and itself after being killed."""

from __future__ import annotations

import csv
import math
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from tav_opt import checkpoint, ddim, models, tuning, tuning_loop, tuning_state, tuning_step
from tav_opt.config import InputError, TrainConfig
from tav_opt.ddim import Schedule
from tav_opt.engines import pytorch
from tav_opt.files import read_json
from tav_opt.memory import eager
from tav_opt.unet import VideoUNet, clip_value_names, inflate
from tav_opt.video import Clip

PROMPT = "a panda is skiing"
QUICK = TrainConfig(steps=6, lr=1e-3, save_every=2, inversion_steps=2)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_ten_golden_steps(golden: Path, checkpointing: bool) -> None:
    data = load_file(golden / "unet_sd1" / "tensors.safetensors")
    unet = models.load_video_unet(golden / "unet_sd1" / "unet3d")
    config = TrainConfig(steps=10, gradient_checkpointing=checkpointing)
    training = tuning.begin(unet, config)
    assert sorted(training.trained) == sorted((golden / "unet_sd1" / "trainable.txt").read_text().split())
    schedule = Schedule.from_config(read_json(golden / "unet_sd1" / "scheduler_config.json"))

    def draw(step: int, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
        return data["tune.noise"][step], data["tune.timesteps"][step]

    for _ in range(10):
        tuning.train_step(training, unet, data["tune.latents"], data["tune.text"], schedule, config, draw)
    assert torch.tensor(training.losses).sub(data["tune.losses"]).abs().max() < 1e-5
    for name, value in training.trained.items():
        error = value.sub(data[f"tuned.{name}"]).abs().max()
        assert error < 1e-5, f"{name} departs by {error:.1e}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than they bring in models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def clip(frames: int = 3, size: int = 64) -> Clip:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
    return Clip(frames=pixels, fps=8.0)


@pytest.fixture
def base(golden: Path) -> str:
    return str(golden / "reference_checkpoint" / "sd")


def tuned_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (checkpoint.VALUES, checkpoint.LATENTS)}


def small(golden: Path) -> tuple[VideoUNet, torch.Tensor, torch.Tensor, Schedule]:
    unet = models.load_video_unet(golden / "unet_sd1" / "unet3d")
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 3, 8, 8, generator=generator), torch.randn(1, 7, 24, generator=generator)
    return unet, latents, text, Schedule.from_config(read_json(golden / "unet_sd1" / "scheduler_config.json"))


def steps_of(golden: Path, config: TrainConfig, steps: int = 3) -> tuning.Training:
    unet, latents, text, schedule = small(golden)
    training = tuning.begin(unet, config)
    draw = tuning.seeded_draw(config.seed, latents, schedule)
    for _ in range(steps):
        tuning.train_step(training, unet, latents, text, schedule, config, draw)
    return training


def test_checkpoint_holds_what_was_tuned(base: str, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    out = tmp_path / "ckpt"
    config = replace(QUICK, preview_every=4, preview_prompts=("a dog",))
    tuned = tuning.tune(base, clip(), PROMPT, config, out, on_step=lambda *call: calls.append(call[:3]))
    assert calls == [("tune", i, 6) for i in range(1, 7)] + [("invert", i, 2) for i in (1, 2)]
    names = {"checkpoint.json", "values.safetensors", "latents.safetensors", "preview.png", "loss.csv", "loss.png"}
    assert {path.name for path in out.iterdir()} == {*names, "previews"}
    assert [path.name for path in (out / "previews").iterdir()] == ["step-00004.png"]
    rows = list(csv.reader((out / "loss.csv").open()))
    assert rows[0] == ["step", "loss"] and [int(row[0]) for row in rows[1:]] == list(range(1, 7))
    assert tuned.info.prompt == PROMPT and (tuned.info.frames, tuned.info.height) == (3, 64)
    # What is on disk inverts the clip to the latents on disk: an edit starts from its own model's inversion.
    sd = models.load(base)
    before = {name: value.clone() for name, value in sd.unet.named_parameters()}
    assert set(tuned.values) == set(clip_value_names(sd.unet, config.trainable))
    moved = {name for name, value in tuned.values.items() if not torch.equal(value, before[name].half())}
    assert moved == {name for name in tuned.values if ".norm_temp." not in name}
    models.put_values(sd.unet, tuned.values)

    def predict(latents: torch.Tensor, timestep: int, text: torch.Tensor) -> torch.Tensor:
        return sd.unet(latents, torch.tensor([timestep]), text)

    inverted = ddim.invert(
        predict, models.encode_video(sd, clip().frames), models.encode_prompt(sd, [""]), sd.schedule, 2
    )
    assert (inverted - tuned.inverted_latents).abs().max() < 1e-5
    with pytest.raises(InputError, match="finished checkpoint: choose another"):
        tuning.tune(base, clip(), PROMPT, config, out)


def test_tuning_lowers_the_loss(golden: Path) -> None:
    unet, latents, text, schedule = small(golden)
    config = TrainConfig(lr=1e-2)
    training = tuning.begin(unet, config)
    draw = tuning.seeded_draw(33, latents, schedule)
    for _ in range(30):  # one draw again and again
        tuning.train_step(training, unet, latents, text, schedule, config, lambda *_: draw(0, 0))
    assert training.losses[-1] < 0.9 * training.losses[0], training.losses


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_is_that_of_diffusers_process(golden: Path, kind: str) -> None:
    _, latents, text, _ = small(golden)
    config = {**read_json(golden / "unet_sd1" / "scheduler_config.json"), "prediction_type": kind}
    process = DDPMScheduler.from_config(config)
    noise, timesteps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([613])

    class Unet:
        def __call__(self, noisy: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            assert (noisy - process.add_noise(latents, noise, timesteps)).abs().max() < 1e-6
            return noisy * 0.5

    loss = tuning_step.denoising_loss(Unet(), latents, text, Schedule.from_config(config), noise, timesteps)  # type: ignore[arg-type]
    target = noise if kind == "epsilon" else process.get_velocity(latents, noise, timesteps)
    expected = (process.add_noise(latents, noise, timesteps) * 0.5 - target).square().mean()
    assert abs(loss - expected) < 1e-6


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_is_that_of_diffusers(name: str, warmup: int) -> None:
    config = TrainConfig(steps=31, schedule=name, warmup=warmup)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    kind = "constant_with_warmup" if name == "constant" else name
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=31)
    for step in range(31):
        assert math.isclose(tuning_step.lr_factor(config, step), theirs.get_last_lr()[0], abs_tol=1e-12), f"step {step}"
        optimizer.step()
        theirs.step()


def test_accumulated_gradient_is_that_of_the_mean_loss(golden: Path) -> None:
    unet, latents, text, schedule = small(golden)
    config = TrainConfig(accumulation=3, clip_norm=1e9)
    training = tuning.begin(unet, config)
    draw = tuning.seeded_draw(33, latents, schedule)
    draws = [draw(0, micro) for micro in range(3)]
    noises, timesteps = (torch.cat(parts) for parts in zip(*draws, strict=True))
    batch = tuning_step.denoising_loss(
        unet, latents.expand(3, -1, -1, -1, -1), text.expand(3, -1, -1), schedule, noises, timesteps
    )
    expected = torch.autograd.grad(batch, list(training.trained.values()))
    tuning.train_step(training, unet, latents, text, schedule, config, draw)
    assert abs(training.losses[0] - batch.item()) < 1e-5
    for (name, parameter), gradient in zip(training.trained.items(), expected, strict=True):
        moment = training.optimizer.state[parameter]["exp_avg"] / (1 - config.betas[0])
        assert (moment - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


HALVES = pytest.mark.parametrize("precision, half", [("fp16", torch.float16), ("bf16", torch.bfloat16)])


@HALVES
def test_half_precision_has_masters_in_float32(
    golden: Path, precision: str, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = steps_of(golden, TrainConfig(steps=3, lr=1e-4))
    monkeypatch.setattr(torch, "autocast", None)  # which would cast every weight every step
    training = steps_of(golden, TrainConfig(steps=3, lr=1e-4, autocast=precision))  # type: ignore[arg-type]
    assert all(value.dtype == torch.float32 for value in training.trained.values())
    assert {value.dtype for value in training.halves.values()} == {half} and not exact.halves
    assert training.scaler.is_enabled() == (precision == "fp16")
    assert training.losses != exact.losses, "nothing ran in half precision"
    assert np.allclose(training.losses, exact.losses, rtol=0.02)
    moved = [(value - exact.trained[name]).abs().max().item() for name, value in training.trained.items()]
    assert max(moved) <= 6.1e-4  # Adam moves a value by at most lr a step, either way
    for name, value in training.halves.items():
        assert torch.equal(value, training.trained[name].to(half)) and value.grad is None, name
    assert any(not torch.equal(value, value.to(half).float()) for value in training.trained.values())


@HALVES
def test_the_frozen_weights_dtype_is_computed_in(golden: Path, precision: str, half: torch.dtype) -> None:
    """Masters of weights that were halves; the gradients of several draws add up in float32."""
    unet, latents, text, schedule = small(golden)
    training = tuning.begin(unet.to(half), TrainConfig(steps=2, accumulation=2))
    assert {value.dtype for value in unet.parameters()} == {half}
    assert training.scaler.is_enabled() == (precision == "fp16") and len(training.halves) == len(training.trained)
    draw, config = tuning.seeded_draw(33, latents, schedule), TrainConfig(accumulation=2, clip_norm=math.inf)
    parts = []
    for micro in range(2):
        loss = tuning_step.denoising_loss(unet, latents, text, schedule, *draw(0, micro)) / 2
        scaled = training.scaler.scale(loss)
        gradients = torch.autograd.grad(scaled, list(training.halves.values()))
        parts.append([gradient.float() / (scaled / loss).item() for gradient in gradients])
    tuning.train_step(training, unet, latents, text, schedule, config, draw)
    assert training.step == 1
    for (name, master), *gradients in zip(training.trained.items(), *parts, strict=True):
        moment = training.optimizer.state[master]["exp_avg"] / (1 - config.betas[0])
        assert (moment - sum(gradients)).norm() <= 1e-5 * moment.norm() + 1e-9, name


def test_a_state_without_moments_is_gone_on_from(golden: Path) -> None:
    """Saved before the loss's scale has found its place: no step has changed anything."""
    config = TrainConfig(steps=2, autocast="fp16")
    unet, latents, text, schedule = small(golden)
    training = tuning.begin(unet, config)
    training.losses.append(1.0)
    tensors, extra = tuning_step.state_of(training)
    assert not [name for name in tensors if name.startswith("exp_avg")]
    tensors = {name: value.clone() for name, value in tensors.items()}
    unet, other = small(golden)[0], tuning.begin(small(golden)[0], config)
    again = tuning.begin(unet, config)
    with torch.no_grad():
        next(iter(again.trained.values())).zero_()
    tuning_step.restore(again, tensors, extra)
    assert again.step == 1 and all(torch.equal(value, other.halves[name]) for name, value in again.halves.items())
    tuning.train_step(again, unet, latents, text, schedule, config, tuning.seeded_draw(33, latents, schedule))
    with pytest.raises(InputError, match=r"exp_avg\..* is missing or another"):
        tuning_step.restore(again, tensors, {"scaler": {}})


def test_the_checkpoint_holds_the_masters(base: str, tmp_path: Path) -> None:
    """And is inverted by what is read back, in the precision that the clip was tuned in."""
    config = replace(QUICK, steps=2, autocast="bf16", preview_every=2, preview_prompts=("a dog",), keep_state=True)
    tuned = tuning.tune(base, clip(), PROMPT, config, tmp_path / "ckpt")
    state = load_file(tmp_path / "ckpt" / tuning_state.STATE)
    masters = {name.removeprefix("master."): x for name, x in state.items() if name.startswith("master.")}
    assert masters and all(torch.equal(tuned.values[name], value.half()) for name, value in masters.items())
    sd = models.load(base)
    sd.unet.to(torch.bfloat16)
    models.put_values(sd.unet, tuned.values)

    def predict(latents: torch.Tensor, timestep: ddim.Timestep, text: torch.Tensor) -> torch.Tensor:
        return sd.predict(latents, timestep, text)

    source = models.encode_video(sd, clip().frames)
    inverted = ddim.invert(predict, source, models.encode_prompt(sd, [""]), sd.schedule, 2)
    assert torch.equal(inverted, tuned.inverted_latents)
    engine = pytorch.open_checkpoint(tmp_path / "ckpt", dtype=torch.bfloat16)
    assert torch.equal(engine.inverted_latents, inverted), "edits in halves begin at what was inverted, not rounded"


def test_determinism_is_strict_on_gpus_and_ends_with_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch.utils.deterministic  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = settings.fill_uninitialized_memory
    with tuning_loop.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not settings.fill_uninitialized_memory and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled() and settings.fill_uninitialized_memory == before


def test_draws_depend_on_seed_step_and_micro_step_alone(golden: Path) -> None:
    _, latents, _, schedule = small(golden)
    draw = tuning.seeded_draw(33, latents, schedule)
    first = draw(4, 1)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(4, 1), strict=True))
    others = [draw(5, 1), draw(4, 0), tuning.seeded_draw(34, latents, schedule)(4, 1)]
    assert not any(torch.equal(first[0], other[0]) for other in others)
    noise, timesteps = zip(*(draw(step, 0) for step in range(400)), strict=True)
    assert abs(torch.cat(noise).std() - 1) < 0.01
    assert torch.cat(timesteps).min() < 25 and torch.cat(timesteps).max() > 975


class Killed(BaseException):
    """Stands for a process that ends in the middle of a step."""


def stop_at(step: int) -> tuning.OnStep:
    def on_step(stage: str, done: int, steps: int, loss: float) -> None:
        if (stage, done) == ("tune", step):
            raise Killed

    return on_step


def test_stopped_run_refuses_other_settings_and_goes_on_under_its_own(base: str, tmp_path: Path) -> None:
    config = replace(QUICK, schedule="cosine", accumulation=2, autocast="fp16")
    tuning.tune(base, clip(), PROMPT, config, tmp_path / "whole")
    out = tmp_path / "stopped"
    with pytest.raises(Killed):
        tuning.tune(base, clip(), PROMPT, config, out, on_step=stop_at(5))
    with pytest.raises(InputError, match="half-written"):
        checkpoint.load(out)
    for other in ({"config": replace(config, lr=2e-3)}, {"prompt": "a dog"}, {"clip": clip(2)}):
        given = {"clip": clip(), "prompt": PROMPT, "config": config} | other
        with pytest.raises(InputError, match=r"holds the state of a run with (lr|prompt|clip) "):
            tuning.tune(base, out=out, **given)  # type: ignore[arg-type]
    seen: list[int] = []
    tuning.tune(base, clip(), PROMPT, replace(config, save_every=1), out, on_step=lambda _s, i, *_: seen.append(i))
    assert seen == [5, 6, 1, 2]  # from the state after step 4
    assert tuned_files(out) == tuned_files(tmp_path / "whole")


def test_run_killed_before_its_last_act_only_clears_up(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(tuning_state, "remove", lambda folder: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            tuning.tune(base, clip(), PROMPT, QUICK, out)
    files = tuned_files(out)
    tuning.tune(base, clip(), PROMPT, QUICK, out, on_step=stop_at(6))
    assert tuned_files(out) == files and not (out / tuning_state.STATE).exists()


def _tune(base: str, out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    tuning.tune(base, clip(), PROMPT, replace(QUICK, save_every=1), out)


def test_two_threads_repeat_themselves_bit_for_bit(golden: Path) -> None:
    torch.set_num_threads(2)
    once, again = steps_of(golden, TrainConfig(lr=1e-2), 2), steps_of(golden, TrainConfig(lr=1e-2), 2)
    assert once.losses == again.losses
    for name, value in once.trained.items():
        assert torch.equal(value, again.trained[name]), name


@pytest.mark.parametrize(
    ("kills", "threads"), [(2, 1), pytest.param(200, 2, marks=pytest.mark.full)], ids=["2_kills", "200_kills"]
)
def test_killed_at_random_moments_ends_in_the_same_weights(base: str, tmp_path: Path, kills: int, threads: int) -> None:
    context = multiprocessing.get_context("forkserver")  # real processes, the imports paid once
    context.set_forkserver_preload(["tav_opt.tuning"])

    def run(out: Path, seconds: float | None) -> int | None:
        process = context.Process(target=_tune, args=(base, out, threads))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode

    assert run(tmp_path / "warm", None) == 0
    start = time.monotonic()
    assert run(tmp_path / "whole", None) == 0
    length = time.monotonic() - start
    expected, done, turn = tuned_files(tmp_path / "whole"), 0, 0
    moments = random.Random(33)
    while done < kills:
        out, turn = tmp_path / f"killed-{turn}", turn + 1
        while (code := run(out, moments.uniform(0, length) if done < kills else None)) != 0:
            assert code == -9, f"after {done} kills the run ended by itself with {code}"
            done += 1
            if checkpoint.is_checkpoint(out) and not (out / tuning_state.STATE).exists():
                break  # killed after its last act: a finished checkpoint is refused
        assert tuned_files(out) == expected, f"other weights after {done} kills"
        assert not list(out.glob("resume*")) and not list(out.glob(".*"))


def test_full_disk_is_one_line_and_keeps_the_last_state(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ckpt"
    saved: list[Path] = []
    save_file = checkpoint.save_file

    def full_after_one(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
        if saved:
            path.write_bytes(b"half")
            message = "Error while serializing: I/O error: No space left on device (os error 28)"
            raise checkpoint.SafetensorError(message)
        saved.append(path)
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_after_one)
        with pytest.raises(InputError, match=r"^disk full while writing .*resume.safetensors"):
            tuning.tune(base, clip(), PROMPT, QUICK, out)
    assert [path.name for path in out.iterdir()] == [tuning_state.STATE]
    seen: list[int] = []
    tuning.tune(base, clip(), PROMPT, QUICK, out, on_step=lambda _s, i, *_: seen.append(i))
    assert seen[0] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt '' is empty"),
        ({"prompt": "word " * 90}, "tokens long"),
        ({"clip": clip(2, 60)}, "not a multiple of 8"),
        ({"model": "./nowhere"}, "neither a directory nor a hub id"),
        ({"config": replace(QUICK, steps=0)}, "steps 0 is not within 1"),
        ({"config": replace(QUICK, lr=math.nan)}, "lr nan is not within"),
        ({"config": replace(QUICK, trainable=("attn3",))}, "'attn3'"),
        ({"config": replace(QUICK, preview_every=2)}, "preview_every 2 needs preview_prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(base: str, tmp_path: Path, changes: dict, message: str) -> None:
    given = {"model": base, "clip": clip(), "prompt": PROMPT, "config": QUICK} | changes
    with pytest.raises(InputError, match=message) as raised:
        tuning.tune(**given, out=tmp_path / "ckpt")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ckpt" / "checkpoint.json").exists()


def test_loss_that_is_no_number_stops_the_run(golden: Path) -> None:
    unet, latents, text, schedule = small(golden)
    training = tuning.begin(unet, QUICK)
    draw = tuning.seeded_draw(33, latents, schedule)
    with pytest.raises(InputError, match=r"loss became nan at step 1: lower the learning rate \(0.001\)"):
        tuning.train_step(training, unet, latents * math.inf, text, schedule, QUICK, draw)


def test_two_processes_do_not_tune_into_one_folder(base: str, tmp_path: Path) -> None:
    with tuning_state.claim(tmp_path / "ckpt"), pytest.raises(InputError, match="being tuned by another process"):
        tuning.tune(base, clip(), PROMPT, QUICK, tmp_path / "ckpt")


def test_too_little_memory_is_said_before_anything_runs(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "free_bytes", lambda device: 2**20)
    for told, words in (
        (False, "try gradient checkpointing or fewer"),
        (None, "with gradient checkpointing, .* fewer"),
    ):
        with pytest.raises(InputError, match=f"tuning 3 frames of 64×64 needs about .*{words}"):
            tuning.tune(base, clip(), PROMPT, replace(QUICK, gradient_checkpointing=told), tmp_path / "ckpt")
        assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("told", [None, False, True])
@pytest.mark.parametrize("enough", ["for either", "with it alone", "for neither"])
def test_gradient_checkpointing_is_on_where_memory_asks_for_it(
    base: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, told: bool | None, enough: str
) -> None:
    sd, config = models.load(base), TrainConfig(gradient_checkpointing=told)
    sizes = {
        on: eager.estimate_tuning(sd, replace(config, gradient_checkpointing=on), 8, 512, 512) for on in (False, True)
    }
    assert (
        sizes[True]
        < sizes[False]
        == eager.estimate_tuning(sd, replace(config, gradient_checkpointing=None), 8, 512, 512)
    )
    has = {"for either": sizes[False], "with it alone": sizes[True], "for neither": sizes[True] - 1}[enough]
    loaded = sum(p.nbytes for part in (sd.unet, sd.vae, sd.text_encoder) for p in part.parameters())
    monkeypatch.setattr(eager, "free_bytes", lambda device: has - loaded)
    if enough == "for neither" or (enough, told) == ("with it alone", False):
        with pytest.raises(InputError, match="tuning 8 frames of 512×512 needs about"):
            eager.fit_tuning(sd, config, 8, 512, 512)
        return
    found = eager.fit_tuning(sd, config, 8, 512, 512)
    assert found == replace(config, gradient_checkpointing=told if told is not None else enough == "with it alone")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (told is None and enough == "with it alone")
    assert not said or said[0].startswith("gradient checkpointing is on: without it tuning needs about ")


RSS = """
import dataclasses, resource, sys
import psutil, torch
from diffusers import UNet2DConditionModel
from tav_opt import models, tuning
from tav_opt.memory import eager
from tav_opt.config import TrainConfig
from tav_opt.unet import inflate

torch.set_num_threads(1)
sd = models.load(sys.argv[1])
unet = UNet2DConditionModel(
    sample_size=32, block_out_channels=(64, 128, 256, 256), cross_attention_dim=128, attention_head_dim=4
)
sd = dataclasses.replace(sd, unet=inflate(unet).eval())
config = TrainConfig(gradient_checkpointing=sys.argv[2] == "True")
loaded = sum(p.nbytes for part in (sd.unet, sd.vae, sd.text_encoder) for p in part.parameters())
before = psutil.Process().memory_info().rss - loaded
latents, text = torch.randn(1, 4, 8, 32, 32), torch.randn(1, 77, 128)
draw = tuning.seeded_draw(33, latents, sd.schedule)
tuning.train_step(tuning.begin(sd.unet, config), sd.unet, latents, text, sd.schedule, config, draw)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(peak, eager.estimate_tuning(sd, config, 8, 256, 256))
"""


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_memory_is_estimated_within_half(base: str, checkpointing: bool) -> None:
    command = [sys.executable, "-c", RSS, base, str(checkpointing)]
    peak, estimate = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert 0.67 < estimate / peak < 1.5, f"{estimate / 2**20:.0f} MiB estimated, {peak / 2**20:.0f} measured"


def test_gradient_checkpointing_keeps_less_and_the_estimate_says_so(base: str) -> None:
    wide = UNet2DConditionModel(block_out_channels=(64, 128, 128, 128), cross_attention_dim=32, attention_head_dim=4)
    sd = replace(models.load(base), unet=inflate(wide))
    latents, text = torch.randn(1, 4, 4, 16, 16), torch.randn(1, 7, 32)
    kept, estimates = [], []
    for checkpointing in (False, True):
        config = TrainConfig(gradient_checkpointing=checkpointing)
        tuning.begin(sd.unet, config)
        frozen = {p.untyped_storage().data_ptr() for p in sd.unet.parameters()}
        sizes: dict[int, int] = {}
        alive: list[torch.Tensor] = []  # addresses stay different only while tensors live

        def pack(x: torch.Tensor, sizes: dict[int, int] = sizes, alive: list[torch.Tensor] = alive) -> torch.Tensor:
            alive.append(x)
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            sd.unet(latents, torch.tensor([5]), text)
        kept.append(sum(size for address, size in sizes.items() if address not in frozen))
        estimates.append(eager.estimate_tuning(sd, config, 4, 128, 128))
    assert kept[1] < 0.4 * kept[0]
    assert 0.75 < (estimates[0] - estimates[1]) / (kept[0] - kept[1]) < 1.33
