"""Videos of requests, decoded apart; the truth is what was encoded, lossless in RGB."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from encoded import SOURCES, lossless, mutated, pictures
from fakes import Stop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tav_opt import ddim
from tav_opt.config import InputError
from tav_opt.serving import decoding
from tav_opt.serving.decoding import Wanted

WANTED = Wanted(least=4, most=4, height=64, width=64)


def decoded(data: bytes, **changes) -> np.ndarray:
    return decoding.decode(data, replace(WANTED, **changes), seconds=60)


@pytest.mark.parametrize("shape", [(4, 64, 64), (2, 16, 24), (1, 8, 8)])
def test_a_video_is_decoded_apart_to_the_frames_it_has(shape):
    frames = pictures(*shape)
    found = decoded(lossless(frames), least=shape[0], most=shape[0], height=shape[1], width=shape[2])
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


@pytest.mark.parametrize("count", [2, 5, 6])
def test_a_range_of_numbers_may_be_wanted(count):
    frames = pictures(count, 64, 64)
    if count in range(3, 6):
        np.testing.assert_array_equal(decoded(lossless(frames), least=3, most=5), frames)
        return
    with pytest.raises(InputError, match=r"(2|over 5) frames.*; the clip takes 3 to 5 frames of 64×64"):
        decoded(lossless(frames), least=3, most=5)


def test_a_decoder_that_crashes_or_hangs_is_only_a_refusal(monkeypatch, tmp_path):
    for body, words in (("kill -SEGV $$", "cannot be decoded"), ("sleep 60", r"longer than 0\.3 s")):
        program = tmp_path / "python-that-fails"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setattr(decoding, "_python", lambda: str(tmp_path / "python-that-fails"))
        with pytest.raises(InputError, match=words):
            decoding.decode(b"x" * 1_000_000, WANTED, seconds=0.3)


def test_decoding_stops_when_the_client_leaves(monkeypatch, tmp_path):
    program = tmp_path / "python-that-waits"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(decoding, "_python", lambda: str(program))
    with pytest.raises(ddim.Stopped):
        decoding.decode(b"x", WANTED, seconds=60, keep_waiting=Stop(2, ddim.Stopped()))


def attempt(data: bytes) -> None:
    """Either the clip's frames or a refusal in one line: nothing else may come out of a hostile file."""
    try:
        found = decoding.frames_of(data, WANTED)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert found.shape == (4, 64, 64, 3) and found.dtype == np.uint8


mutations = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from("setinsdelcut")), max_size=6)


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
