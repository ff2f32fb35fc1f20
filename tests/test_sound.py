"""The source's sound beside an edit: what is heard when, by FFmpeg; copied where MP4 knows it."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from exported import FRAMES, SIDE
from fakes import SHORT, FakeEngine, answered, editor, frames_like

from tav_opt import cli, tuning, video
from tav_opt.client.sources import fitted
from tav_opt.config import InputError, TrainConfig
from tav_opt.contract import ServedClip, to_tensors
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.video import sound

RATE, FPS, SECONDS = 48_000, 30, 4
LOUD = (2.0, 2.5)
"""When a tone is heard; else there is silence."""


def tone() -> np.ndarray:
    """float32 (2, samples)."""
    time = np.arange(RATE * SECONDS) / RATE
    heard = np.sin(2 * np.pi * 440 * time) * ((time >= LOUD[0]) & (time < LOUD[1])) * 0.5
    return np.stack([heard, heard]).astype(np.float32)


def recorded(path: Path, codec: str, container: str, rate: int = RATE) -> Path:
    """Four seconds of moving noise with the tone."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w", format=container) as file:
        pictures = file.add_stream("libx264", rate=FPS, options={"preset": "ultrafast"})
        pictures.width = pictures.height = SIDE
        pictures.pix_fmt = "yuv420p"
        heard = file.add_stream(codec, rate=rate, layout="stereo")
        for _ in range(FPS * SECONDS):
            pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            file.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(pictures.encode(None))
        for at in range(0, RATE * SECONDS, 1000):
            frame = av.AudioFrame.from_ndarray(tone()[:, at : at + 1000].copy(), format="fltp", layout="stereo")
            frame.rate, frame.pts = RATE, at
            frame.time_base = Fraction(1, RATE)
            file.mux(heard.encode(frame))
        file.mux(heard.encode(None))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return recorded(tmp_path_factory.mktemp("sound") / "source.mp4", "aac", "mp4")


def loud(data: bytes) -> tuple[float, float, float]:
    """From when to when a file's sound is loud, and how long it is, in seconds."""
    heard = np.zeros(RATE * SECONDS)
    end = 0.0
    with av.open(io.BytesIO(data)) as file:
        for frame in file.decode(audio=0):
            at = round(float(frame.pts * frame.time_base) * RATE)
            values = np.abs(frame.to_ndarray()[0]).repeat(RATE // frame.rate)[: len(heard) - max(at, 0)]
            heard[max(at, 0) : max(at, 0) + len(values)] = values
            end = (at + len(values)) / RATE
    where = np.flatnonzero(heard > 0.2)
    return (where[0] / RATE, where[-1] / RATE, end) if len(where) else (0, 0, end)


def has_sound(data: bytes) -> bool:
    with av.open(io.BytesIO(data)) as file:
        return bool(file.streams.audio)


def packets(data: bytes) -> list[bytes]:
    with av.open(io.BytesIO(data)) as file:
        return [bytes(packet) for packet in file.demux(audio=0) if packet.size]


def near(found: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert np.allclose(found, expected, atol=0.06), (found, expected)


def test_the_tone_is_heard_when_its_pictures_are_shown(source):
    """From 1.5 to 3.5 s of the source."""
    clip = video.read(source, start=45, stride=2, count=30)
    assert clip.fps == 15, "it moves as the source does"
    data = video.encode_mp4(clip.frames, clip.fps, sound=clip.sound)
    near(loud(data), (0.5, 1.0, 2.0))
    again = video.decode(data)
    assert again.frames.shape == clip.frames.shape and again.fps == 15
    copied, own = packets(data), packets(source.read_bytes())
    assert any(own[at : at + len(copied)] == copied for at in range(len(own))), "it was encoded anew"
    assert data.index(b"moov") < data.index(b"mdat")


def test_frames_spread_over_the_clip_have_all_of_its_sound(source):
    clip = video.read(source, count=5, uniform=True)
    assert clip.sound is not None and abs(clip.fps - 4 / (119 / 30)) < 1e-3
    near(loud(video.encode_mp4(clip.frames, clip.fps, sound=clip.sound)), (*LOUD, SECONDS))


@pytest.mark.parametrize(
    ("codec", "container", "kept"),
    [("pcm_s16le", "matroska", "aac"), ("libopus", "webm", "opus"), ("flac", "mp4", "aac")],
)
def test_what_players_of_mp4_do_not_know_is_encoded_anew(tmp_path, codec, container, kept):
    path = recorded(tmp_path / "source", codec, container if codec != "libopus" else "matroska")
    clip = video.read(path, start=30, count=60)
    data = video.encode_mp4(clip.frames, clip.fps, {"a": 1}, sound=clip.sound)
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.audio[0].codec_context.name == kept
    near(loud(data), (1.0, 1.5, 2.0))


@pytest.mark.parametrize(
    ("codec", "rate", "kept"),
    [
        ("pcm_s16le", 192_000, ("aac", 48_000)),
        ("pcm_s16le", 37_000, ("aac", 48_000)),
        ("mp3", 44_100, ("mp3", 44_100)),
        ("mp3", 8_000, ("aac", 8_000)),
    ],
)
def test_rates_that_neither_aac_nor_mp4_have(tmp_path, codec, rate, kept):
    path = recorded(tmp_path / "source.mkv", codec, "matroska", rate)
    clip = video.read(path, start=30, count=60)
    data = video.encode_mp4(clip.frames, clip.fps, {"a": 1}, sound=clip.sound)
    with av.open(io.BytesIO(data)) as file:
        found = file.streams.audio[0].codec_context
        assert (found.codec.canonical_name, found.sample_rate) == kept
    begin, end, length = loud(data)
    near((begin, end), (1.0, 1.5))
    assert abs(length - 2.0) < 0.06 + 1024 / kept[1], "more than a packet beyond the pictures"
    if codec == kept[0]:
        copied, own = packets(data), packets(path.read_bytes())
        assert copied and any(own[at : at + len(copied)] == copied for at in range(len(own))), "it was encoded anew"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no Matroska",
        lambda data: data[: len(data) // 20],
        lambda data: data[:600] + bytes(255 - byte for byte in data[600:]),
        lambda data: Path(__file__).read_bytes(),
    ],
)
def test_sound_that_is_damaged_costs_no_picture(tmp_path, caplog, damage):
    path = recorded(tmp_path / "source.mkv", "flac", "matroska")
    clip = video.read(path, start=30, count=60)
    bare, broken = video.encode_mp4(clip.frames, clip.fps, {"a": 1}), damage(clip.sound)
    data = video.encode_mp4(clip.frames, clip.fps, {"a": 1}, sound=broken)
    assert np.array_equal(video.decode(data).frames, video.decode(bare).frames)
    assert sound.added(bare, broken) == bare or has_sound(data)
    if not has_sound(data):
        assert data == bare and "the sound is left out: " in caplog.text
    video.write(tmp_path / "edit.mp4", clip.frames, clip.fps, sound=broken)
    assert len(video.read(tmp_path / "edit.mp4").frames) == 60


def test_sound_is_added_to_a_file_that_was_encoded_elsewhere(source):
    clip = video.read(source, start=30, count=60)
    bare = video.encode_mp4(clip.frames, clip.fps, {"a": "ü"})
    data = sound.added(bare, clip.sound)
    near(loud(data), (1.0, 1.5, 2.0))
    with av.open(io.BytesIO(bare)) as before, av.open(io.BytesIO(data)) as after:
        assert before.metadata["comment"] == after.metadata["comment"]
        shown = [[bytes(packet) for packet in file.demux(video=0)] for file in (before, after)]
    assert shown[0] == shown[1]


def test_what_has_no_sound_gets_none(source, tmp_path):
    clip = video.read(source, count=4)
    for name in ("clip.gif", "clip", "clip.mp4"):
        video.write(tmp_path / name, clip.frames, clip.fps)
        assert video.read(tmp_path / name).sound is None
    video.write(tmp_path / "with.gif", clip.frames, clip.fps, sound=clip.sound)
    assert video.decode(source.read_bytes(), count=4).sound is None, "what others send is not looked at for it"


def test_sound_that_cannot_be_kept_is_left_out_and_told_of(source, monkeypatch, caplog):
    monkeypatch.setattr(sound, "MAX_BYTES", 1000)
    clip = video.read(source, count=90)
    assert clip.sound is None and len(clip.frames) == 90
    assert "its sound is left out: over" in caplog.text


@pytest.fixture(scope="module")
def clip(golden, source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sounding") / "ckpt"
    taken = video.read(source, start=60, stride=4, count=FRAMES)
    config = TrainConfig(steps=1, inversion_steps=2)
    tuning.tune(golden / "reference_checkpoint" / "sd", taken, "a man", config, folder)
    return folder


@pytest.mark.parametrize(
    ("options", "speed", "heard"), [("", 7.5, True), ("--side-by-side", 7.5, True), ("--fps 12", 12, False)]
)
def test_an_edit_sounds_as_its_source_unless_its_speed_is_another(clip, tmp_path, options, speed, heard):
    out = tmp_path / "edit.mp4"
    asked = f"--prompt x --steps 2 --device cpu --out {out} {options}".split()
    assert cli.main(["edit", str(clip), *asked]) == 0
    assert video.read(out).fps == speed
    assert has_sound(out.read_bytes()) == heard
    if heard:
        near(loud(out.read_bytes()), (0.0, 0.5, FRAMES / 7.5))


def test_a_checkpoint_keeps_its_sound_and_notices_another(clip):
    assert packets(open_checkpoint(clip).sound)
    data = (clip / "sound.mka").read_bytes()
    try:
        (clip / "sound.mka").write_bytes(data[:-1])
        with pytest.raises(InputError, match=r"sound\.mka is missing or altered"):
            open_checkpoint(clip)
    finally:
        (clip / "sound.mka").write_bytes(data)


@pytest.mark.parametrize(
    ("changes", "speed", "heard"),
    [({}, 8, True), ({"fps": 8.0}, 8, True), ({"fps": 4.0}, 4, False), ({"source_frames": True}, 8, False)],
)
def test_the_worker_adds_the_clips_own_sound_alone(clip, changes, speed, heard):
    engine = FakeEngine()
    engine.sound = open_checkpoint(clip).sound
    if changes.get("source_frames"):
        changes = {"source_frames": frames_like(engine, 1)}
    responses, _ = answered(editor(engine), to_tensors("toy", SHORT, output="mp4", **changes))
    (data,) = responses[-1]["video"]
    assert responses[-1]["fps"] == [speed] and video.decode(data).fps == speed
    assert has_sound(data) == heard


def test_a_video_sent_in_the_clips_place_brings_its_speed_and_sound(source):
    told = ServedClip(frames=4, height=8, width=8, fps=7.5, prompt="", inversion_steps=2)
    as_fast = fitted({"stride": 4}, source, told, began=0)
    assert as_fast["fps"] is None and as_fast["sound"]
    faster = fitted({"stride": 2}, source, told, began=0)
    assert faster["fps"] == 15 and faster["sound"]
    asked = fitted({"stride": 2, "fps": 3.0}, source, replace(told), began=0)
    assert asked["fps"] == 3 and "sound" not in asked
