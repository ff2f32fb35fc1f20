"""A clip longer than its network takes: tuned on windows, edited, exported on the base of the window, served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import FRAMES, SIDE, Exported, export_once, tuned
from fakes import GIB, SHORT, FakeEngine, Stop, answered, editor, nothing, told

from tav_opt import checkpoint, ddim, editing, models, tuning, video, windows
from tav_opt.config import EditConfig, InputError, TrainConfig
from tav_opt.contract import ClipInfo, to_tensors
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.engines.registry import open_clip
from tav_opt.export.exporting import export
from tav_opt.memory.promises import Memory
from tav_opt.serving import failures
from tav_opt.serving.failures import Unavailable
from tav_opt.tuning_step import window_begin
from tav_opt.video import masks

LONG = 7
INFO = ClipInfo(
    base="sd", base_hash="0123456789abcdef" * 4, prompt="x", frames=LONG, height=64, width=64, fps=8, inversion_steps=4
)
EDIT = EditConfig(prompts=("a panda",), steps=2, guidance_scale=7.5)


def frames_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


# Tuned.


@pytest.fixture(scope="module")
def clip(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LONG frames, tuned two steps on windows of FRAMES."""
    folder = tmp_path_factory.mktemp("long") / "ckpt"
    config = TrainConfig(steps=2, inversion_steps=2, window=FRAMES, accumulation=2)
    tuning.tune(golden / "reference_checkpoint" / "sd", video.Clip(frames=frames_of(LONG), fps=8), "x", config, folder)
    return folder


def test_a_checkpoint_keeps_all_frames_and_names_its_window(clip: Path):
    found = checkpoint.load(clip)
    assert (found.info.frames, found.info.window, found.info.network_frames) == (LONG, FRAMES, FRAMES)
    assert found.source_latents.shape[2] == found.inverted_latents.shape[2] == LONG
    assert found.info.exported_base.endswith(f"-{FRAMES}x{SIDE}x{SIDE}")


def test_the_clip_is_inverted_by_windows(clip: Path):
    engine = open_checkpoint(clip)
    sizes: list[int] = []

    def predict(latents, timestep, text):
        sizes.append(latents.shape[2])
        return engine.sd.predict(latents, timestep, text)

    expected = ddim.invert(
        windows.windowed(predict, FRAMES), engine.source_latents, engine.encode_text([""]), engine.schedule, 2
    )
    assert set(sizes) == {FRAMES} and len(sizes) == 2 * len(windows.begins(LONG, FRAMES))
    assert torch.allclose(engine.inverted_latents, expected, atol=1e-5)


def test_tuning_draws_every_window_and_goes_on_with_the_same():
    found, again, other = ([window_begin(seed, step, 0, 3) for step in range(200)] for seed in (33, 33, 34))
    assert set(found) == {0, 1, 2, 3} and min(map(found.count, range(4))) > 25
    assert found == again != other


def test_a_window_of_all_frames_is_none_and_a_longer_one_is_refused(golden: Path, tmp_path: Path):
    base, source = golden / "reference_checkpoint" / "sd", video.Clip(frames=frames_of(3), fps=8)
    config = TrainConfig(steps=1, inversion_steps=1)
    whole = tuning.tune(base, source, "x", replace(config, window=3), tmp_path / "whole")
    plain = tuning.tune(base, source, "x", config, tmp_path / "plain")
    assert whole.info.window is None
    assert all(torch.equal(value, plain.values[name]) for name, value in whole.values.items())
    with pytest.raises(InputError, match="window 4: the clip has 3 frames"):
        tuning.tune(base, source, "x", replace(config, window=4), tmp_path / "longer")


# Edited.


def test_an_edit_has_all_frames_whatever_goes_at_once(clip: Path):
    engine = open_checkpoint(clip)
    one, all_at_once = (editing.edit(engine, EDIT, windows_at_once=count) for count in (1, 9))
    assert one.shape == (1, LONG, SIDE, SIDE, 3) and np.abs(one.astype(int) - all_at_once).max() <= 1


def test_a_longer_source_is_edited_and_a_shorter_one_refused_with_the_number(clip: Path):
    engine = open_checkpoint(clip)
    config = replace(EDIT, inversion_steps=1)
    assert editing.edit(engine, config, frames=frames_of(LONG + 2)).shape[1] == LONG + 2
    assert editing.edit(engine, config, frames=frames_of(FRAMES)).shape[1] == FRAMES
    with pytest.raises(InputError, match=f"{FRAMES - 1} frames, but the network takes {FRAMES} at once"):
        editing.edit(engine, config, frames=frames_of(FRAMES - 1))


def test_outside_a_mask_an_edit_is_the_sources_reconstruction(clip: Path, monkeypatch):
    engine, decoded = open_checkpoint(clip), []
    decode = models.decode_video
    monkeypatch.setattr(models, "decode_video", lambda sd, latents: decoded.append(latents) or decode(sd, latents))
    mask = np.zeros((LONG, SIDE, SIDE), bool)
    mask[:, :, : SIDE // 4] = True
    found = editing.edit(engine, EDIT, mask=mask)[0].astype(int)
    assert found.shape == (LONG, SIDE, SIDE, 3)
    latents, source = decoded[0], engine.source_latents
    outside = latents.shape[4] // 4 + 1
    assert torch.equal(latents[..., outside:], source[..., outside:]), "the decoder is given the source there"
    assert (latents[..., : outside - 2] - source[..., : outside - 2]).abs().mean() > 0.1
    white = editing.edit(engine, EDIT, mask=np.ones((1, SIDE, SIDE), bool))
    assert np.array_equal(white, editing.edit(engine, EDIT))


def test_a_mask_of_a_file_is_chosen_as_the_clip_was(clip: Path, tmp_path: Path):
    engine = open_checkpoint(clip)
    mask = np.zeros((1, SIDE, SIDE), bool)
    mask[:, :, : SIDE // 4] = True
    (tmp_path / "mask.mkv").write_bytes(masks.encoded(mask))
    assert np.array_equal(editing.edit(engine, EDIT, mask=tmp_path / "mask.mkv"), editing.edit(engine, EDIT, mask=mask))


# Exported.


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def long(exported: Exported, shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A clip of LONG frames on the base that was exported for FRAMES."""
    short, sd = tuned(shallow, frames_of(FRAMES), seed=2), models.load(shallow)
    models.put_values(sd.unet, short.values)
    source = models.encode_video(sd, frames_of(LONG))
    info = replace(short.info, frames=LONG, window=FRAMES, inversion_steps=2)
    empty = models.encode_prompt(sd, [""])
    inverted = ddim.invert(windows.windowed(sd.predict, FRAMES), source, empty, sd.schedule, 2)
    folder = tmp_path_factory.mktemp("checkpoint") / "long"
    checkpoint.save(replace(short, info=info, source_latents=source, inverted_latents=inverted), folder, settings={})
    export(folder, exported.repository, on_graph=lambda *_: pytest.fail("the base is there"))
    return "long"


def test_a_long_clip_is_exported_on_the_windows_base_and_edited_as_by_eager(exported, long, tmp_path):
    engine = open_clip(exported.repository, long, threads=1)
    assert engine.base.folder == exported.version / "base" / exported.base.name
    found = editing.edit(engine, EDIT)
    eager = open_checkpoint(exported.version / "clips" / long)
    assert eager.source_latents.shape[2] == LONG == found.shape[1]
    difference = np.abs(found.astype(int) - editing.edit(eager, EDIT))
    assert difference.max() <= 2 and difference.mean() < 0.05


def test_a_short_clip_takes_longer_sources_in_every_way(exported: Exported):
    engine = open_clip(exported.repository, "first", threads=1)
    config = replace(EDIT, inversion_steps=1)
    assert editing.edit(engine, config, frames=frames_of(LONG)).shape[1] == LONG
    with pytest.raises(InputError, match=rf"frames are \({FRAMES - 1}, .* or more frames"):
        editing.edit(engine, config, frames=frames_of(FRAMES - 1))


@pytest.mark.parametrize("window", [1, LONG, LONG + 1, "4", -1])
def test_descriptions_that_lie_about_their_window_are_refused(window):
    assert ClipInfo.from_json(INFO.to_json() | {"window": FRAMES}).network_frames == FRAMES
    with pytest.raises(InputError, match="window"):
        ClipInfo.from_json(INFO.to_json() | {"window": window})


def test_a_clip_of_before_has_no_window():
    described = INFO.to_json()
    del described["window"]
    assert ClipInfo.from_json(described) == INFO


# Served, without a server.


def source(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def asked(count: int, **changes):
    config = replace(SHORT, inversion_steps=2, prompts=changes.pop("prompts", SHORT.prompts))
    return to_tensors("toy", config, source_frames=source(count), **changes)


def test_large_results_come_in_parts_as_they_are_decoded_and_the_last_has_none():
    frame_bytes = 2 * 8 * 8 * 3
    responses, _ = answered(editor(FakeEngine(), response_bytes=3 * frame_bytes), asked(7, prompts=("a", "b")))
    parts = [answer["frames"] for answer in responses if "frames" in answer]
    assert [part.shape[:2] for part in parts] == [(2, 3), (2, 3), (2, 1)]
    assert told(responses)[-4:] == [("render", 3, 7), ("render", 6, 7), ("render", 7, 7), ("done", 3, 3)]
    assert "frames" not in responses[-1] and "metadata" in responses[-1] and "fps" in responses[-1]


def test_a_result_that_fits_comes_whole_and_so_does_a_file():
    responses, _ = answered(editor(FakeEngine()), asked(7))
    assert responses[-1]["frames"].shape == (1, 7, 8, 8, 3)
    responses, _ = answered(editor(FakeEngine(), response_bytes=1), asked(7, output="mp4"))
    assert len(video.decode(responses[-1]["video"][0]).frames) == 7


def test_the_windows_of_a_step_go_at_once_as_the_worker_is_told_and_memory_is_asked_for_them():
    engine = FakeEngine()
    answered(editor(engine, windows_at_once=3), asked(7))
    count = len(windows.begins(7, 2))
    assert count == 6 and engine.batches == [3, 3] * 2 + [6, 6] * 3
    with pytest.raises(Unavailable, match=r"needs about 3\.00 GiB"):
        answered(editor(FakeEngine(), windows_at_once=3, memory=Memory(lambda: 2 * GIB)), asked(7))


def test_the_frames_of_a_long_source_are_counted():
    free = GIB + 1000
    with pytest.raises(Unavailable) as caught:
        answered(editor(FakeEngine(), memory=Memory(lambda: free)), asked(1024))
    assert failures.status(caught.value) == "UNAVAILABLE"


def test_sources_have_as_many_frames_as_a_window_and_no_more_than_the_worker_takes():
    for count in (1, 9):
        with pytest.raises(InputError, match=f"has {count} frames of 8×8; clip toy takes 2 to 8 frames of 8×8"):
            answered(editor(FakeEngine(), longest_source=8), asked(count))


def test_a_long_step_can_be_left_between_its_windows():
    engine = FakeEngine()
    with pytest.raises(ddim.Stopped):
        answered(editor(engine), asked(40), Stop(20, ddim.Stopped()))
    assert 0 < len(engine.batches) <= 20 < len(windows.begins(40, 2))


def test_a_mask_that_was_sent_is_held_against_the_source():
    def shown(count: int, value: bool = True) -> bytes:
        return masks.encoded(np.full((count, 8, 8), value))

    for count in (1, 5):
        responses, _ = answered(editor(FakeEngine()), asked(5, mask=shown(count)))
        assert b'"masked": true' in responses[-1]["metadata"][0]
    with pytest.raises(InputError, match="mask has 3 frames: must have 1, or 5"):
        answered(editor(FakeEngine()), asked(5, mask=shown(3)))
    with pytest.raises(InputError, match="black all over"):
        answered(editor(FakeEngine()), asked(5, mask=shown(1, False)), nothing)
