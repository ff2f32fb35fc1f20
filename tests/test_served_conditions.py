"""Requests with maps to follow, beside sources of other lengths, masks and attention control; without a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from controls import maps_of
from fakes import GIB, SHORT, FakeEngine, answered, editor
from torch import Tensor

from tav_opt.conditions.condition import MID
from tav_opt.config import Control, InputError
from tav_opt.contract import to_tensors
from tav_opt.ddim import Text, Timestep
from tav_opt.memory.promises import Memory
from tav_opt.serving import decoding
from tav_opt.serving.failures import Unavailable
from tav_opt.video import masks
from tav_opt.video.lossless import encode_mkv

EDIT = replace(SHORT, inversion_steps=2, controls=(Control(name="pose"),))


class Network:
    """Adds a number a frame, the mean of its map."""

    names = (MID,)

    def following(self, maps: Tensor, scale: float) -> Callable[..., dict[str, Tensor]]:
        means = scale * maps.mean((1, 2, 3))
        return lambda latents, *_: {MID: means[None, :, None, None, None].expand(len(latents), -1, 1, 1, 1)}


class Following(FakeEngine):
    """Keeps what it is told, and what memory it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = {"pose": Network()}
        self.told: list[Text] = []
        self.asked: list[dict[str, Any]] = []

    def predict(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        self.told.append(text)
        return super().predict(latents, timestep, text)

    def extra_bytes(self, prompts: int, **asked: Any) -> int:
        self.asked.append(asked)
        return super().extra_bytes(prompts, **asked)


def asked(maps: int, source: int | None = None, **changes: Any) -> dict[str, np.ndarray]:
    """Of so many frames each; the fake clip has two."""
    config = replace(EDIT, **changes.pop("settings", {}))
    videos = [encode_mkv(maps_of(maps, 8, 8, 1)) for _ in config.controls]
    frames = None if source is None else maps_of(source, 8, 8, 2)
    return to_tensors("toy", config, source_frames=frames, control_videos=videos, **changes)


def test_windows_of_a_long_source_are_told_of_their_own_maps() -> None:
    engine = Following()
    answered(editor(engine), asked(5, source=5))
    told = [text for text in engine.told if not isinstance(text, Tensor)]
    means = torch.from_numpy(maps_of(5, 8, 8, 1)).float().mean((1, 2, 3)) / 255
    own = [means[[0, frame]] for frame in range(1, 5)]  # a window of two: the clip's first frame, and one more
    assert len(told) == 4 * EDIT.steps and len(engine.told) == 4 * 2 + len(told), "inverted without them"
    for text, expected in zip(told, own * EDIT.steps, strict=True):
        assert torch.allclose(text[MID][1].flatten(), expected, atol=1e-6)


def test_the_inversion_is_told_of_them_where_that_is_asked_for() -> None:
    engine = Following()
    answered(editor(engine), asked(5, source=5, settings={"control_inversion": True}))
    assert not [text for text in engine.told if isinstance(text, Tensor)]


def test_memory_is_asked_for_the_networks_and_all_frames_of_the_source() -> None:
    engine = Following()
    answered(editor(engine), asked(5, source=5))
    assert [one["controls"] for one in engine.asked] == [["pose"]] * len(engine.asked)
    assert {one["frames"] for one in engine.asked[:2]} == {0} and {one["frames"] for one in engine.asked[2:]} == {5}
    engine = Following()
    engine.extra_bytes = lambda prompts, frames=0, **_: (prompts + frames) * GIB  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match=r"needs about 6\.00 GiB"):
        answered(editor(engine, memory=Memory(lambda: 4 * GIB)), asked(5, source=5))


@pytest.mark.parametrize(("maps", "source", "takes"), [(3, None, 2), (5, 4, 4), (4, 5, 5)])
def test_maps_of_another_length_than_the_source_are_refused(maps: int, source: int | None, takes: int) -> None:
    decode = lambda data, wanted, go_on: decoding.decode(data, wanted, seconds=60, keep_waiting=go_on)  # noqa: E731
    with pytest.raises(InputError, match=f"input control_video: .*takes {takes} frames of 8×8"):
        answered(editor(Following(), decode=decode), asked(maps, source=source))


def test_maps_are_held_against_a_video_once_its_length_is_known() -> None:
    video = encode_mkv(maps_of(5, 8, 8, 2))
    answered(editor(Following()), asked(5, video=video))
    with pytest.raises(InputError, match=r"control pose: its maps are uint8 \(4, 8, 8, 3\).* 5 frames of 8×8"):
        answered(editor(Following()), asked(4, video=video))


def test_a_mask_and_maps_are_for_one_edit() -> None:
    engine = Following()
    responses, _ = answered(editor(engine), asked(2, mask=masks.encoded(np.ones((1, 8, 8), bool))))
    assert b'"masked": true' in responses[-1]["metadata"][0] and b'"pose"' in responses[-1]["metadata"][0]
    assert not any(isinstance(text, Tensor) for text in engine.told[-EDIT.steps :])


@pytest.mark.parametrize("settings", [{"keep": "motion"}, {"word_weights": ("panda:2",)}, {"replace_cross": 0.5}])
def test_attention_control_and_maps_are_refused_before_a_clip_is_opened(settings: dict[str, Any]) -> None:
    def opened(_name: str) -> None:
        raise AssertionError("opened")

    with pytest.raises(InputError, match="'pose' with attention control"):
        answered(editor(Following(), clips=opened), asked(2, settings={"inversion_steps": None} | settings))
