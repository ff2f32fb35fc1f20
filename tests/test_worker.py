"""The worker's parts without a server: edits, clips, inversions, decoding, previews, reports."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from exported import Exported, export_once, write_other
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tav_opt import ddim, editing, model_repository, video
from tav_opt.config import EditConfig, InputError, WorkerConfig
from tav_opt.contract import ClipInfo, to_tensors
from tav_opt.export import repository
from tav_opt.serving import caller, clips, decoding, failures, inversions, previews, worker
from tav_opt.serving.edits import Editor
from tav_opt.serving.failures import DeadlinePassed, Unavailable, UnknownClip
from tav_opt.serving.inversions import Inversions
from tav_opt.serving.report import Report

SHORT = EditConfig(prompts=("a panda is skiing",), steps=3, guidance_scale=7.5)
LONG = replace(SHORT, steps=1000)
GIB = 1 << 30


class FakeEngine:
    """Counts its steps and the prompts of each; every prompt of a batch is said to need a GiB."""

    info = ClipInfo(base="", base_hash="0" * 64, prompt="", frames=2, height=8, width=8, fps=8, inversion_steps=7)
    schedule = ddim.Schedule.from_config({})
    source_latents = inverted_latents = torch.zeros(1, 4, 2, 2, 2)
    revision = "r1"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.encoded: list[np.ndarray] = []

    def encode_text(self, prompts):
        return torch.zeros(len(prompts), 3, 2)

    def encode_video(self, frames):
        self.encoded.append(frames)
        return torch.full_like(self.source_latents, float(frames.mean()))

    def predict(self, latents, timestep, text):
        self.batches.append(latents.shape[0])
        return torch.zeros_like(latents)

    def decode(self, latents):
        return np.zeros((latents.shape[0], latents.shape[2], 8, 8, 3), np.uint8)

    def extra_bytes(self, prompts, *, encode=False):
        return prompts * GIB


def nothing() -> None:
    pass


def editor(engine, **changes) -> Editor:
    given = {
        "clips": lambda _name: engine,
        "inversions": Inversions(memory_limit=GIB),
        "decode": lambda data, info, go_on: decoding.frames_of(data, info.frames, info.height, info.width),
        "free_bytes": lambda: 100 * GIB,
    }
    return Editor(**given | changes)


def answered(editor_: Editor, tensors, go_on=nothing):
    """All responses, the last one too, and the report."""
    sent, report = [], Report()
    last = editor_.answer(tensors, sent.append, go_on, report)
    return [*sent, last], report


def told(responses):
    return [(a["stage"][0].decode(), int(a["step"][0]), int(a["steps"][0])) for a in responses]


# Edits.


def test_every_step_is_told_of_and_the_frames_come_last():
    tensors = to_tensors("toy", replace(SHORT, inversion_steps=2))
    responses, report = answered(editor(FakeEngine()), tensors)
    assert told(responses) == [
        ("invert", 1, 2),
        ("invert", 2, 2),
        *(("sample", n, 3) for n in (1, 2, 3)),
        ("done", 3, 3),
    ]
    assert responses[-1]["frames"].shape == (1, 2, 8, 8, 3)
    assert not any("frames" in answer for answer in responses[:-1])
    assert report.steps == {"invert": 2, "sample": 3}
    assert report.inversion == "computed"


def test_inversion_steps_that_are_absent_are_the_clips_own():
    engine = FakeEngine()
    _, report = answered(editor(engine), to_tensors("toy", SHORT))
    assert engine.batches == [2] * SHORT.steps, "the clip was inverted again"
    assert report.inversion == "clip"


@pytest.mark.parametrize(("free", "batches"), [(100, [6]), (3, [6]), (2, [4, 2]), (1, [2, 2, 2])])
def test_prompts_share_a_batch_where_memory_allows(free, batches):
    engine = FakeEngine()
    config = replace(SHORT, prompts=("a", "b", "c"), steps=1)
    responses, report = answered(editor(engine, free_bytes=lambda: free * GIB), to_tensors("toy", config))
    assert engine.batches == batches
    assert responses[-1]["frames"].shape[0] == 3
    assert report.at_once == batches[0] // 2
    assert told(responses)[-2] == ("sample", len(batches), len(batches))


def test_too_little_memory_is_unavailable_with_the_figures():
    engine = FakeEngine()
    with pytest.raises(Unavailable, match=r"needs about 1\.00 GiB, the server has 0\.25 GiB free") as caught:
        answered(editor(engine, free_bytes=lambda: GIB // 4), to_tensors("toy", SHORT))
    assert failures.status(caught.value) == "UNAVAILABLE"
    assert engine.batches == []


class Stop:
    """Raises at the n-th call."""

    def __init__(self, after: int, error: Exception) -> None:
        self.left, self.error = after, error

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


@pytest.mark.parametrize(
    ("error", "words"), [(ddim.Stopped(), "was cancelled"), (DeadlinePassed("its timeout of 2 s"), "timeout of 2 s")]
)
def test_an_edit_stops_within_one_step(error, words):
    engine = FakeEngine()
    with pytest.raises(ddim.Stopped) as caught:
        answered(editor(engine), to_tensors("toy", LONG), Stop(3, error))
    assert len(engine.batches) == 3
    assert failures.status(caught.value) == "CANCELLED"
    assert words in failures.message(caught.value)


def test_an_edit_cancelled_in_the_queue_never_starts():
    engine = FakeEngine()
    with pytest.raises(ddim.Stopped):
        answered(editor(engine), to_tensors("toy", LONG), Stop(0, ddim.Stopped()))
    assert engine.batches == []


def test_a_cancelled_inversion_leaves_nothing_and_the_next_one_is_whole():
    kept = Inversions(memory_limit=GIB)
    tensors = to_tensors("toy", replace(SHORT, inversion_steps=5))
    with pytest.raises(ddim.Stopped):
        answered(editor(FakeEngine(), inversions=kept), tensors, Stop(3, ddim.Stopped()))
    assert kept.memory_bytes() == 0
    assert answered(editor(FakeEngine(), inversions=kept), tensors)[1].inversion == "computed"
    assert answered(editor(FakeEngine(), inversions=kept), tensors)[1].inversion == "memory"


def frames_like(engine, seed: int) -> np.ndarray:
    info = engine.info
    return np.random.default_rng(seed).integers(0, 256, (info.frames, info.height, info.width, 3), dtype=np.uint8)


def test_a_source_that_was_sent_is_inverted_once_for_its_content_steps_and_clip():
    engine, kept = FakeEngine(), Inversions(memory_limit=GIB)
    frames = frames_like(engine, 1)

    def found(**changes) -> str:
        config = replace(SHORT, inversion_steps=changes.pop("inversion_steps", None))
        tensors = to_tensors("toy", config, **{"source_frames": frames} | changes)
        return answered(editor(engine, inversions=kept), tensors)[1].inversion

    assert [found(), found()] == ["computed", "memory"]
    assert found(inversion_steps=7) == "memory", "the clip's own steps are 7"
    assert found(inversion_steps=6) == "computed"
    assert found(source_frames=255 - frames) == "computed"
    engine.revision = "r2"
    assert found() == "computed"
    np.testing.assert_array_equal(engine.encoded[0], frames)


def test_a_video_that_was_seen_before_is_not_decoded_again():
    engine, decoded = FakeEngine(), []
    data = video.encode_mp4(frames_like(engine, 2), 8)

    def decode(data, info, go_on):
        decoded.append(data)
        return decoding.frames_of(data, info.frames, info.height, info.width)

    ours = editor(engine, decode=decode)
    reports = [answered(ours, to_tensors("toy", SHORT, video=data))[1] for _ in range(2)]
    assert [report.inversion for report in reports] == ["computed", "memory"]
    assert decoded == [data]


def test_frames_of_another_size_are_refused_naming_both():
    frames = np.zeros((3, 8, 16, 3), np.uint8)
    with pytest.raises(InputError, match=r"has 3 frames of 16×8; clip toy takes 2 frames of 8×8"):
        answered(editor(FakeEngine()), to_tensors("toy", SHORT, source_frames=frames))


def test_mp4_is_of_the_frames():
    responses, _ = answered(editor(FakeEngine()), to_tensors("toy", replace(SHORT, prompts=("a", "b")), output="mp4"))
    assert "frames" not in responses[-1]
    found = [video.decode(data) for data in responses[-1]["video"]]
    assert [(clip.frames.shape, clip.fps) for clip in found] == [((2, 8, 8, 3), 8.0)] * 2


class Linear(FakeEngine):
    """Its decoder is a linear map of the latents, four pixels square each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.source_latents = torch.rand((1, 4, 2, 2, 2), generator=generator) - 0.5
        self.inverted_latents = self.source_latents
        self.matrix = torch.rand((4, 3), generator=generator) - 0.5

    def decode(self, latents):
        colours = torch.einsum("bcfhw,cd->bfhwd", latents, self.matrix) + 0.1
        pixels = ((colours / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.repeat_interleave(4, 2).repeat_interleave(4, 3).numpy()


@pytest.mark.parametrize("free", [100, 1])
def test_previews_come_every_so_many_steps_at_the_latents_size(free):
    config = replace(SHORT, prompts=("a", "b"), steps=5, guidance_scale=1.0)
    ours = editor(Linear(), free_bytes=lambda: free * GIB)
    responses, _ = answered(ours, to_tensors("toy", config, preview_interval=2))
    shown = [(a["step"][0], a["preview"]) for a in responses if "preview" in a]
    assert [step for step, _ in shown] == ([2, 4] if free == 100 else [2, 4, 7, 9])
    assert all(preview.shape == (2, 2, 2, 2, 3) for _, preview in shown)
    if free == 1:
        assert not shown[0][1][1].any(), "its turn has not come"
        assert shown[2][1].any(axis=(1, 2, 3, 4)).all()


def test_a_preview_is_what_the_decoder_would_show():
    """The decoder is linear here, so the best linear map is the decoder itself: within rounding."""
    engine = Linear()
    colours = previews.fit(engine.source_latents, engine.decode(engine.source_latents)[0])
    other = torch.rand((1, 4, 2, 2, 2), generator=torch.Generator().manual_seed(7)) - 0.5
    expected = engine.decode(other)[:, :, ::4, ::4]
    assert abs(previews.picture(other, colours).astype(int) - expected).max() <= 2


def test_the_clean_latents_are_told_of_at_every_step():
    """A network that knows the noise predicts the clean latents exactly, from the first step on."""
    schedule = ddim.Schedule.from_config({})
    clean, noise = torch.randn((2, 1, 4, 2, 3, 3), generator=torch.Generator().manual_seed(1)).double()
    seen = []
    first = schedule.alpha(schedule.timesteps(5)[0])
    start = first**0.5 * clean + (1 - first) ** 0.5 * noise
    ddim.sample(lambda *_: noise, start, torch.zeros(1, 1, 1), schedule, 5, on_clean=lambda n, x: seen.append((n, x)))
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5]
    assert max((found - clean).abs().max() for _, found in seen) < 1e-9


# The log line and the settings.


def test_the_log_line_has_the_settings_and_no_prompt_unless_asked():
    config = replace(SHORT, prompts=("a secret\npanda",), negative_prompt="hush")
    _, report = answered(editor(FakeEngine()), to_tensors("toy", config))
    line = report.line(prompts=False)
    assert "clip='toy'" in line and "steps=3" in line and "sample=" in line
    assert "secret" not in line and "hush" not in line
    assert "secret" in report.line(prompts=True) and "hush" in report.line(prompts=True)
    assert "\n" not in report.line(prompts=True)
    assert Report().line(prompts=True)


def test_settings_survive_the_configuration_file(tmp_path):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = WorkerConfig(instances=2, queue_seconds=1.5, cache=Path('/x/"y" \\z'), log_prompts=True, cache_mib=7)
    model_repository.write_model_files(tmp_path, config)
    text = (tmp_path / "tune_a_video_stream" / "config.pbtxt").read_text()
    parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert parsed.instance_group[0].count == 2
    assert parsed.dynamic_batching.default_queue_policy.default_timeout_microseconds == 1_500_000
    parameters = {name: {"string_value": value.string_value} for name, value in parsed.parameters.items()}
    assert model_repository.read_parameters({"parameters": parameters}) == config
    assert model_repository.read_parameters({}) == WorkerConfig()


@pytest.mark.parametrize("change", [{"instances": 0}, {"queue_size": 0}, {"queue_seconds": float("nan")}])
def test_settings_out_of_range_are_named(tmp_path, change):
    with pytest.raises(InputError, match=next(iter(change)).replace("_", " ")):
        model_repository.write_model_files(tmp_path, WorkerConfig(**change))


def test_the_caches_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert worker.cache_folder(WorkerConfig()) == tmp_path / "tav-opt" / "inversions"
    assert worker.cache_folder(WorkerConfig(cache=Path("here"))) == Path("here")
    assert worker.cache_folder(WorkerConfig(cache_mib=0)) is None


# Between the two models.


def test_a_caller_that_hangs_up_is_noticed_and_one_that_never_was_too():
    asking = caller.Caller()
    line = caller.Line(asking.name)
    assert not line.is_hung_up()
    asking.hang_up()
    assert line.is_hung_up()
    for name in (asking.name, "0" * 32, "../../etc", "", None, 7, "x" * 10_000):
        assert caller.Line(name).is_hung_up(), name


# Clips.


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def two_clips(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version folder with the clips `first` and `other` on one base."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(exported.repository, folder / "repository")
    repository.export(write_other(exported, folder), folder / "repository", name="other")
    return folder / "repository" / "tune_a_video_stream" / "1"


@pytest.fixture
def folder(two_clips: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_clips, tmp_path / "1"))


def test_clips_that_are_not_there_and_clips_that_are_damaged(tmp_path):
    found = clips.Clips(tmp_path, limit=GIB)
    for name in ("toy", "../toy", "", "x" * 10_000, "a\x00b", "."):
        with pytest.raises(UnknownClip, match="exported are: none") as caught:
            found.get(name)
        assert failures.status(caught.value) == "NOT_FOUND"
        assert len(str(caught.value)) < 300
    (tmp_path / "clips" / "toy").mkdir(parents=True)
    for content in ("{", "[]", "{}", '{"version": 1}', "\x00"):
        (tmp_path / "clips" / "toy" / "manifest.json").write_text(content)
        with pytest.raises(RuntimeError, match="clip toy cannot be opened") as broken:
            found.get("toy")
        assert failures.status(broken.value) == "INTERNAL"
    assert "\n" not in failures.message(RuntimeError("a\nb"))


@pytest.mark.parametrize("damage", ["values.safetensors", "latents.safetensors"])
def test_a_clip_whose_files_are_damaged_is_refused_and_the_other_served(folder, damage):
    found = clips.Clips(folder, limit=GIB, threads=1)
    (folder / "clips" / "first" / damage).write_bytes(b"\x00" * 100)
    with pytest.raises(RuntimeError, match=f"clip first cannot be opened: .*{damage}"):
        found.get("first")
    assert found.get("other").info.frames == 4
    (folder / "clips" / "first" / damage).unlink()
    with pytest.raises(RuntimeError, match=f"clip first cannot be opened: .*{damage}"):
        found.get("first")


def test_clips_share_a_base_stay_loaded_and_leave_by_their_last_use(folder):
    found = clips.Clips(folder, limit=GIB, threads=1)
    first, other = found.get("first"), found.get("other")
    assert first.base is other.base
    assert found.get("first") is first
    assert found.resident() == (2, first.nbytes + other.nbytes)
    assert first.revision != other.revision
    small = clips.Clips(folder, limit=first.nbytes, threads=1)
    small.get("first"), small.get("other")
    assert small.resident() == (1, other.nbytes)
    assert small.get("other").info.frames == 4


def test_clips_that_are_replaced_or_removed_are_noticed(folder):
    found = clips.Clips(folder, limit=GIB, threads=1)
    before = found.get("first")
    os.rename(folder / "clips" / "first", folder / "clips" / ".first.old")
    os.rename(folder / "clips" / "other", folder / "clips" / "first")
    after = found.get("first")
    assert after.revision != before.revision
    assert before.predict(before.inverted_latents, 1, before.encode_text([""])) is not None, "one in flight goes on"
    shutil.rmtree(folder / "clips" / "first")
    with pytest.raises(UnknownClip, match="exported are: none"):
        found.get("first")
    assert found.resident() == (0, 0)


def test_a_clip_that_is_away_for_a_moment_while_it_is_replaced_is_found(folder):
    found = clips.Clips(folder, limit=GIB, threads=1)
    found.get("first")
    os.rename(folder / "clips" / "first", folder / "clips" / ".first.old")
    timer = threading.Timer(
        clips.REPLACED_SECONDS / 4, os.rename, (folder / "clips" / ".first.old", folder / "clips" / "first")
    )
    timer.start()
    assert found.get("first").info.frames == 4
    timer.join()


def test_memory_that_is_short_of_a_base_is_unavailable_with_the_figures(folder, monkeypatch):
    monkeypatch.setattr(clips, "free_bytes", lambda device: 1)
    with pytest.raises(Unavailable, match=r"opening base .* needs about .* GiB, cpu has 0\.00 GiB free"):
        clips.Clips(folder, limit=GIB, threads=1).get("first")


def test_several_prompts_in_a_batch_are_those_alone(folder):
    """With eta too: the noise of each is that of its seed, whatever is beside it."""
    engine = clips.Clips(folder, limit=GIB, threads=1).get("first")
    config = EditConfig(prompts=("a panda", "a cat is skiing", "a bear"), steps=4, guidance_scale=7.5, eta=0.5, seed=9)
    alone = np.concatenate([editing.edit(engine, replace(config, prompts=(prompt,))) for prompt in config.prompts])
    assert abs(alone[0].astype(int) - alone[1]).max() > 10, "prompts that draw the same prove nothing"
    for free in (10**12, 0):
        ours = editor(engine, free_bytes=lambda free=free: max(free, engine.extra_bytes(1)))
        responses, report = answered(ours, to_tensors("first", config))
        difference = np.abs(responses[-1]["frames"].astype(int) - alone)
        assert report.at_once == (3 if free else 1)
        assert difference.mean() <= 0.05 and difference.max() <= 2, (report.at_once, difference.max())


# Inversions.


def latents(seed: int, values: int = 1000) -> torch.Tensor:
    return torch.randn((1, 4, values // 4, 1, 1), generator=torch.Generator().manual_seed(seed))


def cache(folder: Path | None, **changes) -> Inversions:
    return Inversions(**{"memory_limit": GIB, "folder": folder, "disk_limit": GIB} | changes)


def name_of(number: int) -> str:
    return inversions.key("r", number, "clip")


def never():
    raise AssertionError("computed again")


def test_inversions_survive_a_restart_bit_for_bit(tmp_path):
    assert cache(tmp_path).get(name_of(1), lambda: latents(1))[1] == "computed"
    found, where = cache(tmp_path).get(name_of(1), never)
    assert where == "disk" and torch.equal(found, latents(1))


def test_every_part_of_the_key_counts():
    keys = {inversions.key(r, s, c) for r in ("a", "b") for s in (1, 11) for c in ("clip", "1 clip", "frames 1")}
    assert len(keys) == 12


def test_memory_and_disk_are_bounded_and_what_was_used_last_stays(tmp_path):
    ours = cache(tmp_path, memory_limit=8_000, disk_limit=9_000)
    for number in (1, 2, 1, 3):
        ours.get(name_of(number), lambda number=number: latents(number))
        time.sleep(0.01)  # file systems' clocks tick slowly
    assert 0 < ours.memory_bytes() <= 8_000
    assert 0 < ours.disk_bytes() <= 9_000
    assert ours.get(name_of(1), never)[1] == "memory"
    assert ours.get(name_of(2), lambda: latents(2))[1] == "computed"
    huge = cache(tmp_path, memory_limit=10, disk_limit=10)
    assert torch.equal(huge.get(name_of(9), lambda: latents(9))[0], latents(9))
    assert huge.memory_bytes() == 0


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-1] + b"\x55", lambda _: b"{}"]
)
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    cache(tmp_path).get(name_of(1), lambda: latents(1))
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    troubles = []
    found, where = cache(tmp_path, on_trouble=troubles.append).get(name_of(1), lambda: latents(1))
    assert where == "computed" and torch.equal(found, latents(1))
    assert len(troubles) == 1 and path.name in troubles[0]
    assert cache(tmp_path).get(name_of(1), never)[1] == "disk"


def test_a_full_disk_costs_only_the_copy(tmp_path):
    """RLIMIT_FSIZE makes every write fail as a full disk does."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from tav_opt.serving.inversions import Inversions, key
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
troubles = []
ours = Inversions(memory_limit=1 << 30, folder=Path({str(tmp_path)!r}), disk_limit=1 << 30, on_trouble=troubles.append)
found = [ours.get(key("r", 1, "clip"), lambda: torch.ones(1, 4, 250, 1, 1))[1] for _ in range(2)]
assert found == ["computed", "memory"], found
assert len(troubles) == 1 and "not kept on disk" in troubles[0], troubles
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".lock-")], "a part was left behind"


def test_a_folder_that_cannot_be_made_costs_only_the_disk(tmp_path):
    (tmp_path / "file").write_text("")
    troubles = []
    ours = cache(tmp_path / "file" / "cache", on_trouble=troubles.append)
    assert ours.get(name_of(1), lambda: latents(1))[1] == "computed"
    assert ours.get(name_of(1), never)[1] == "memory"
    assert troubles


def test_of_several_that_ask_at_once_one_computes(tmp_path):
    computing, found = [], []

    def compute():
        computing.append(1)
        time.sleep(0.3)
        return latents(1)

    threads = [
        threading.Thread(target=lambda: found.append(cache(tmp_path).get(name_of(1), compute))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computing) == 1
    assert sorted(where for _, where in found) == ["computed", *["disk"] * 5]
    assert all(torch.equal(one, latents(1)) for one, _ in found)


def test_who_waits_for_anothers_inversion_can_leave_and_takes_over_when_that_one_fails(tmp_path):
    begun, go = threading.Event(), threading.Event()

    def failing():
        begun.set()
        go.wait(10)
        raise ddim.Stopped

    def first():
        with pytest.raises(ddim.Stopped):
            cache(tmp_path).get(name_of(1), failing)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(10)
    with pytest.raises(DeadlinePassed):
        cache(tmp_path).get(name_of(1), never, Stop(3, DeadlinePassed()))
    waited = []
    found, where = cache(tmp_path).get(name_of(1), lambda: latents(1), lambda: (waited.append(1), go.set()))
    thread.join()
    assert waited and where == "computed" and torch.equal(found, latents(1))


# Decoding. The truth is what was encoded: lossless in RGB.

INFO = ClipInfo(base="", base_hash="0" * 64, prompt="", frames=4, height=64, width=64, fps=8, inversion_steps=4)


def lossless(frames: np.ndarray) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def pictures(count: int, height: int, width: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def decoded(data: bytes, **changes) -> np.ndarray:
    return decoding.decode(data, replace(INFO, **changes), seconds=60)


@pytest.mark.parametrize("shape", [(4, 64, 64), (2, 16, 24), (1, 8, 8)])
def test_a_video_is_decoded_apart_to_the_frames_it_has(shape):
    frames = pictures(*shape)
    found = decoded(lossless(frames), frames=shape[0], height=shape[1], width=shape[2])
    np.testing.assert_array_equal(found, frames)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lossless(pictures(5, 64, 64)), "over 4 frames"),
        (lossless(pictures(3, 64, 64)), "video: 3 frames;"),
        (lossless(pictures(4, 32, 64)), "frames of 64×32"),
        (lossless(pictures(1, 640, 640)), "frames of 640×640"),
        (lossless(pictures(4, 64, 64))[:-3000], "cut short"),
        (b"", "is empty"),
        (b"nonsense" * 1000, "none of"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "none of"),
    ],
    ids=["more frames", "fewer", "another height", "larger", "truncated", "empty", "nonsense", "playlist"],
)
def test_other_videos_are_refused_naming_the_clips_size(data, words):
    with pytest.raises(InputError, match=words) as caught:
        decoded(data)
    assert str(caught.value).endswith("the clip takes 4 frames of 64×64")
    assert "\n" not in str(caught.value)


def test_a_decoder_that_crashes_or_hangs_is_only_a_refusal(monkeypatch, tmp_path):
    for body, words in (("kill -SEGV $$", "cannot be decoded"), ("sleep 60", r"longer than 0\.3 s")):
        program = tmp_path / "python-that-fails"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setattr(decoding, "_python", lambda: str(tmp_path / "python-that-fails"))
        with pytest.raises(InputError, match=words):
            decoding.decode(b"x" * 1_000_000, INFO, seconds=0.3)


def test_decoding_stops_when_the_client_leaves(monkeypatch, tmp_path):
    program = tmp_path / "python-that-waits"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(decoding, "_python", lambda: str(program))
    with pytest.raises(ddim.Stopped):
        decoding.decode(b"x", INFO, seconds=60, keep_waiting=Stop(2, ddim.Stopped()))


SOURCES = {
    "mp4": video.encode_mp4(pictures(4, 64, 64), 8),
    "mkv": lossless(pictures(4, 64, 64)),
}


def attempt(data: bytes) -> None:
    """Either the clip's frames or a refusal in one line: nothing else may come out of a hostile file."""
    try:
        found = decoding.frames_of(data, 4, 64, 64)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert found.shape == (4, 64, 64, 3) and found.dtype == np.uint8


mutations = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from("setinsdelcut")), max_size=6)


def mutated(data: bytes, changes: list[tuple[float, int, str]]) -> bytes:
    found = bytearray(data)
    for where, value, how in changes:
        at = int(where * len(found))
        match how:
            case "s" | "e" | "t" if at < len(found):
                found[at] = value
            case "i" | "n":
                found[at:at] = bytes([value]) * (1 + value)
            case "d" | "l":
                del found[at : at + 1 + value]
            case "c" | "u":
                del found[at:]
    return bytes(found)


def _fuzz(kind: str, changes: list[tuple[float, int, str]]) -> None:
    attempt(mutated(SOURCES[kind], changes))


SLOW = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
test_a_hostile_video_is_refused_or_decoded = settings(max_examples=60, **SLOW)(
    given(kind=st.sampled_from(sorted(SOURCES)), changes=mutations)(_fuzz)
)
test_many_hostile_videos_are_refused_or_decoded = pytest.mark.full(
    settings(max_examples=3000, **SLOW)(given(kind=st.sampled_from(sorted(SOURCES)), changes=mutations)(_fuzz))
)


@settings(max_examples=60, **SLOW)
@given(
    data=st.binary(max_size=300),
    head=st.sampled_from([b"", b"GIF89a", b"RIFF\x24\0\0\0WEBPVP8 ", b"\x1aE\xdf\xa3", b"\0\0\0\x18ftypmp42"]),
)
def test_bytes_of_any_kind_are_refused(data, head):
    attempt(head + data)


def test_the_unary_face_needs_no_torch():
    code = "import sys, tav_opt.serving.unary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
