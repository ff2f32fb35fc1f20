"""The clips of a version folder: opened, shared, replaced, removed, damaged."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exported import Exported, export_once, write_other
from fakes import GIB, answered, editor

from tav_opt import editing
from tav_opt.config import EditConfig
from tav_opt.contract import to_tensors
from tav_opt.export import exporting
from tav_opt.memory.promises import Memory
from tav_opt.serving import catalogue, failures, resident
from tav_opt.serving.failures import Unavailable, UnknownClip


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def two_clips(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version folder with the clips `first` and `other` on one base."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(exported.repository, folder / "repository")
    exporting.export(write_other(exported, folder), folder / "repository", name="other")
    return folder / "repository" / "tune_a_video_stream" / "1"


@pytest.fixture
def folder(two_clips: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_clips, tmp_path / "1"))


def test_clips_that_are_not_there_and_clips_that_are_damaged(tmp_path):
    found = resident.Clips(tmp_path, limit=GIB)
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
    found = resident.Clips(folder, limit=GIB, threads=1)
    (folder / "clips" / "first" / damage).write_bytes(b"\x00" * 100)
    with pytest.raises(RuntimeError, match=f"clip first cannot be opened: .*{damage}"):
        found.get("first")
    assert found.get("other").info.frames == 4
    (folder / "clips" / "first" / damage).unlink()
    with pytest.raises(RuntimeError, match=f"clip first cannot be opened: .*{damage}"):
        found.get("first")


def test_clips_share_a_base_stay_loaded_and_leave_by_their_last_use(folder):
    found = resident.Clips(folder, limit=GIB, threads=1)
    first, other = found.get("first"), found.get("other")
    assert first.base is other.base
    assert found.get("first") is first
    assert found.resident() == (2, first.held_bytes + other.held_bytes)
    assert first.revision != other.revision
    small = resident.Clips(folder, limit=first.held_bytes, threads=1)
    small.get("first"), small.get("other")
    assert small.resident() == (1, other.held_bytes)
    assert small.get("other").info.frames == 4


def test_clips_that_are_replaced_or_removed_are_noticed(folder):
    found = resident.Clips(folder, limit=GIB, threads=1)
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
    found = resident.Clips(folder, limit=GIB, threads=1)
    found.get("first")
    os.rename(folder / "clips" / "first", folder / "clips" / ".first.old")
    timer = threading.Timer(
        catalogue.REPLACED_SECONDS / 4, os.rename, (folder / "clips" / ".first.old", folder / "clips" / "first")
    )
    timer.start()
    assert found.get("first").info.frames == 4
    timer.join()


def test_memory_that_is_short_of_a_base_is_unavailable_with_the_figures(folder):
    with pytest.raises(Unavailable, match=r"opening base .* needs about .* GiB, cpu has 0\.00 GiB free"):
        resident.Clips(folder, limit=GIB, threads=1, memory=Memory(lambda: 1)).get("first")


def test_several_prompts_in_a_batch_are_those_alone(folder):
    """With eta too: the noise of each is that of its seed, whatever is beside it."""
    engine = resident.Clips(folder, limit=GIB, threads=1).get("first")
    config = EditConfig(prompts=("a panda", "a cat is skiing", "a bear"), steps=4, guidance_scale=7.5, eta=0.5, seed=9)
    alone = np.concatenate([editing.edit(engine, replace(config, prompts=(prompt,))) for prompt in config.prompts])
    assert abs(alone[0].astype(int) - alone[1]).max() > 10, "prompts that draw the same prove nothing"
    for free in (10**12, 0):
        ours = editor(engine, memory=Memory(lambda free=free: max(free, engine.extra_bytes(1))))
        responses, report = answered(ours, to_tensors("first", config))
        difference = np.abs(responses[-1]["frames"].astype(int) - alone)
        assert report.at_once == (3 if free else 1)
        assert difference.mean() <= 0.05 and difference.max() <= 2, (report.at_once, difference.max())
