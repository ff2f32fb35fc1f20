"""One request from its tensors to the last response, without a server."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from encoded import comments
from fakes import GIB, LONG, SHORT, FakeEngine, Stop, answered, editor, frames_like, told

from tav_opt import ddim, video
from tav_opt.config import InputError
from tav_opt.contract import to_tensors
from tav_opt.memory.promises import Memory
from tav_opt.serving import decoding, failures, previews
from tav_opt.serving.failures import DeadlinePassed, Unavailable
from tav_opt.serving.inversions import Inversions


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


@pytest.mark.parametrize(
    ("inversion_steps", "words"),
    [(50, "inversion steps 50 with direct inversion: must be as many as steps, 20"), (20, "no such UNet")],
)
def test_settings_are_held_against_each_other_with_what_a_preset_brings(inversion_steps, words):
    """Direct inversion wants as many steps as there are: the preset's 20, and not the 50 of who gives none."""
    kept = replace(SHORT, steps=50, keep="motion", inversion_steps=inversion_steps)
    tensors = to_tensors("toy", kept, preset="fast", left_out={"steps"})
    with pytest.raises(InputError, match=words):
        answered(editor(FakeEngine()), tensors)


def test_a_base_without_the_graph_says_how_to_get_it():
    engine = FakeEngine()
    with pytest.raises(InputError, match=r"no such UNet: attention control needs .*--attention-control"):
        answered(editor(engine), to_tensors("toy", replace(SHORT, keep="motion")))
    assert not engine.batches


@pytest.mark.parametrize(("free", "batches"), [(100, [6]), (3, [6]), (2, [4, 2]), (1, [2, 2, 2])])
def test_prompts_share_a_batch_where_memory_allows(free, batches):
    engine = FakeEngine()
    config = replace(SHORT, prompts=("a", "b", "c"), steps=1)
    responses, report = answered(editor(engine, memory=Memory(lambda: free * GIB)), to_tensors("toy", config))
    assert engine.batches == batches
    assert responses[-1]["frames"].shape[0] == 3
    assert report.at_once == batches[0] // 2
    assert told(responses)[-2] == ("sample", len(batches), len(batches))


@pytest.mark.parametrize("iterations", [0, 3])
def test_an_inversion_that_comes_to_nothing_is_said_and_not_kept(iterations):
    """It once was kept, or stood for the source as if that had been inverted."""
    kept, engine = Inversions(memory_limit=GIB), FakeEngine()
    engine.predict = lambda latents, *_: torch.full_like(latents, float("nan"))
    tensors = to_tensors("toy", replace(SHORT, inversion_steps=2, inversion_iterations=iterations))
    with pytest.raises(FloatingPointError, match="NaN or infinity") as caught:
        answered(editor(engine, inversions=kept), tensors)
    assert failures.status(caught.value) == "INTERNAL" and kept.memory_bytes() == 0


def test_an_edit_leaves_amid_a_step_that_is_refined():
    engine = FakeEngine()
    engine.predict = lambda latents, *_: engine.batches.append(1) or torch.randn(latents.shape)
    tensors = to_tensors("toy", replace(SHORT, inversion_steps=2, inversion_iterations=100))
    with pytest.raises(ddim.Stopped):
        answered(editor(engine), tensors, Stop(10, ddim.Stopped()))
    assert 0 < len(engine.batches) <= 10


def test_too_little_memory_is_unavailable_with_the_figures():
    engine = FakeEngine()
    with pytest.raises(Unavailable, match=r"needs about 1\.00 GiB, the server has 0\.25 GiB free") as caught:
        answered(editor(engine, memory=Memory(lambda: GIB // 4)), to_tensors("toy", SHORT))
    assert failures.status(caught.value) == "UNAVAILABLE"
    assert engine.batches == []


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


def test_a_source_that_was_sent_is_inverted_once_for_its_content_steps_and_clip():
    engine, kept = FakeEngine(), Inversions(memory_limit=GIB)
    frames = frames_like(engine, 1)

    def found(**changes) -> str:
        own = {name: changes.pop(name, None) for name in ("inversion_steps", "inversion_iterations")}
        config = replace(SHORT, **own)
        tensors = to_tensors("toy", config, **{"source_frames": frames} | changes)
        return answered(editor(engine, inversions=kept), tensors)[1].inversion

    assert [found(), found()] == ["computed", "memory"]
    assert found(inversion_steps=7) == "memory", "the clip's own steps are 7"
    assert found(inversion_steps=6) == "computed"
    assert found(inversion_iterations=0) == "memory", "the clip's own are 0"
    assert found(inversion_iterations=2) == "computed"
    assert found(source_frames=255 - frames) == "computed"
    engine.revision = "r2"
    assert found() == "computed"
    np.testing.assert_array_equal(engine.encoded[0], frames)


def test_a_video_that_was_seen_before_is_not_decoded_again():
    engine, decoded = FakeEngine(), []
    data = video.encode_mp4(frames_like(engine, 2), 8)

    def decode(data, wanted, go_on):
        decoded.append(data)
        return decoding.frames_of(data, wanted)

    ours = editor(engine, decode=decode)
    reports = [answered(ours, to_tensors("toy", SHORT, video=data))[1] for _ in range(2)]
    assert [report.inversion for report in reports] == ["computed", "memory"]
    assert decoded == [data]


def test_frames_of_another_size_are_refused_naming_both():
    frames = np.zeros((3, 8, 16, 3), np.uint8)
    with pytest.raises(InputError, match=r"has 3 frames of 16×8; clip toy takes 2 to 1024 frames of 8×8"):
        answered(editor(FakeEngine()), to_tensors("toy", SHORT, source_frames=frames))


def test_mp4_is_of_the_frames():
    responses, _ = answered(editor(FakeEngine()), to_tensors("toy", replace(SHORT, prompts=("a", "b")), output="mp4"))
    assert "frames" not in responses[-1]
    found = [video.decode(data) for data in responses[-1]["video"]]
    assert [(clip.frames.shape, clip.fps) for clip in found] == [((2, 8, 8, 3), 8.0)] * 2


@pytest.mark.parametrize("with_prompts", [True, False])
@pytest.mark.parametrize("output", ["mp4", "frames"])
def test_edits_say_how_they_were_made(tmp_path, output, with_prompts):
    config = replace(SHORT, prompts=("a", "b"), seed=9, negative_prompt="c")
    tensors = to_tensors("toy", config, output=output, prompt_metadata=with_prompts)
    last = answered(editor(FakeEngine()), tensors)[0][-1]
    said = [json.loads(text) for text in last["metadata"]]
    assert [(one["clip"], one["seed"], one["steps"]) for one in said] == [("toy", 9, SHORT.steps)] * 2
    assert [one.get("prompts") for one in said] == ([["a"], ["b"]] if with_prompts else [None, None])
    assert [one.get("negative_prompt") for one in said] == ["c" if with_prompts else None] * 2
    if output == "mp4":
        for number, (data, one) in enumerate(zip(last["video"], said, strict=True)):
            (tmp_path / f"{number}.mp4").write_bytes(data)
            assert comments(tmp_path / f"{number}.mp4") == [one]


class Linear(FakeEngine):
    """Its decoder is a linear map of the latents, four pixels square each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.source_latents = torch.rand((1, 4, 2, 2, 2), generator=generator) - 0.5
        self.inverted_latents = self.source_latents
        self.matrix = torch.rand((4, 3), generator=generator) - 0.5

    def decode(self, latents, on_part=lambda: None):
        colours = torch.einsum("bcfhw,cd->bfhwd", latents, self.matrix) + 0.1
        pixels = ((colours / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.repeat_interleave(4, 2).repeat_interleave(4, 3).numpy()


@pytest.mark.parametrize("free", [100, 1])
def test_previews_come_every_so_many_steps_at_the_latents_size(free):
    config = replace(SHORT, prompts=("a", "b"), steps=5, guidance_scale=1.0)
    ours = editor(Linear(), memory=Memory(lambda: free * GIB))
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
