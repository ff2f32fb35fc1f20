"""Sources longer than the network takes, results in parts and masks, through the real server and the client."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from exported import FRAMES, SIDE, Exported, export_once
from served import Wire, raw, serving
from test_sound import recorded

from tav_opt import cli, editing, video
from tav_opt.client import AsyncClient, Client
from tav_opt.config import EditConfig, InputError, WorkerConfig
from tav_opt.contract import UNARY_MODEL, to_tensors
from tav_opt.engines.registry import open_clip
from tav_opt.serving.host.server import Server
from tav_opt.video import masks

LONG, LONGEST = 13, 500
EDIT = EditConfig(prompts=tuple("abcdefgh"), steps=1, guidance_scale=1.0, inversion_steps=1)
"""8 × 13 frames of 64²: 1.2 MiB."""


def noise(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def mask_of(count: int) -> np.ndarray:
    mask = np.zeros((count, SIDE, SIDE), bool)
    mask[:, :, : SIDE // 4] = True
    return mask


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def server(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served-long")
    repository = Path(shutil.copytree(exported.repository, folder / "repository"))
    config = WorkerConfig(cache=folder / "cache", response_mib=1, longest_source=LONGEST, windows_at_once=2)
    with serving(repository, config) as running:
        yield running


@pytest.fixture(scope="module")
def expected(exported: Exported) -> np.ndarray:
    """The same edit without a server."""
    return editing.edit(open_clip(exported.repository, "first", threads=1), EDIT, frames=noise(LONG))


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(found.astype(int) - expected)
    assert found.shape == expected.shape and expected.std() > 10
    assert difference.mean() <= 0.05 and difference.max() <= 2, (difference.mean(), difference.max())


def test_a_large_result_comes_in_parts_which_both_clients_join(server, expected):
    with Client(server.grpc_url) as client:
        progress = []
        found = client.edit("first", EDIT, source_frames=noise(LONG), on_progress=lambda *told: progress.append(told))
    assert_same(found.frames, expected)
    rendered = [told for told in progress if told[0] == "render"]
    assert len(rendered) == 2 and rendered[-1] == ("render", LONG, LONG)

    async def ask() -> np.ndarray:
        async with AsyncClient(server.grpc_url) as client:
            return (await client.edit("first", EDIT, source_frames=noise(LONG))).frames

    assert np.array_equal(asyncio.run(ask()), found.frames)


def test_no_message_is_larger_than_the_worker_is_told(server):
    with Wire(server.grpc_url) as wire:
        answer = wire.ask(raw(to_tensors("first", EDIT, source_frames=noise(LONG))))
    sizes = [response["frames"].nbytes for response in answer.responses if "frames" in response]
    assert len(sizes) == 2 and max(sizes) <= 1 << 20 and "frames" not in answer.last and "metadata" in answer.last


@pytest.mark.full
def test_five_hundred_frames_come_as_they_are_decoded(server):
    """5.9 MiB over a worker whose messages have one."""
    one = EditConfig(prompts=("x",), steps=1, guidance_scale=1.0, inversion_steps=1)
    with Wire(server.grpc_url) as wire:
        answer = wire.ask(raw(to_tensors("first", one, source_frames=noise(LONGEST))))
    assert answer.status == "OK", answer.message
    parts = [response for response in answer.responses if "frames" in response]
    assert len(parts) == 6 and max(part["frames"].nbytes for part in parts) <= 1 << 20
    assert sum(part["frames"].shape[1] for part in parts) == LONGEST and parts[-1]["step"].item() == LONGEST
    joined = np.concatenate([part["frames"] for part in parts], 1)
    with Client(server.grpc_url) as client:
        assert np.array_equal(client.edit("first", one, source_frames=noise(LONGEST)).frames, joined)


def test_one_response_has_all_of_it(server, expected):
    with Wire(server.grpc_url) as wire:
        answer = wire.infer(UNARY_MODEL, raw(to_tensors("first", EDIT, source_frames=noise(LONG))))
    assert answer.status == "OK", answer.message
    assert_same(answer.last["frames"], expected)


def test_files_of_other_lengths_are_taken_from_the_window_on(server):
    short = {"prompts": ("x",), "steps": 1, "guidance_scale": 1.0, "inversion_steps": 1}
    with Client(server.grpc_url) as client:
        for count in (FRAMES, FRAMES + 1, LONG):
            file = video.encode_mp4(noise(count), 8)
            assert client.edit("first", EditConfig(**short), video=file).frames.shape[1] == count
        for count in (FRAMES - 1, LONGEST + 1):
            with pytest.raises(InputError, match=f"{FRAMES} to {LONGEST} frames of {SIDE}×{SIDE}"):
                client.edit("first", EditConfig(**short), video=video.encode_mp4(noise(count), 8))


def test_the_command_takes_a_long_video_and_its_mask(server, tmp_path, capsys):
    video.write(tmp_path / "source", noise(LONG * 2), 8)
    (tmp_path / "mask.mkv").write_bytes(masks.encoded(mask_of(LONG * 2)))
    options = f"request --url {server.grpc_url} --clip first --prompt x --steps 1 --guidance 1 --inversion-steps 1"
    options += f" --video {tmp_path / 'source'} --stride 2 --frames {LONG} --mask {tmp_path / 'mask.mkv'}"
    assert cli.main([*options.split(), "--out", str(tmp_path / "edit.mp4")]) == 0, capsys.readouterr().err
    assert len(video.read(tmp_path / "edit.mp4").frames) == LONG
    assert video.settings_of(tmp_path / "edit.mp4")["masked"] is True
    assert cli.main([*options.replace(f"--video {tmp_path / 'source'}", "").split()]) == 2
    assert "frames chooses frames of a video" in capsys.readouterr().err


def test_an_edit_comes_at_the_size_of_the_video_with_its_sound(server, tmp_path, capsys):
    frames = np.random.default_rng(6).integers(0, 256, (FRAMES, 48, 96, 3), dtype=np.uint8)
    heard = video.read(recorded(tmp_path / "heard.mkv", "aac", "matroska"), count=FRAMES)
    (tmp_path / "source.mp4").write_bytes(video.encode_mp4(frames, heard.fps, sound=heard.sound))
    options = f"request --url {server.grpc_url} --clip first --prompt x --steps 1 --guidance 1 --inversion-steps 1"
    options += f" --size source --out {tmp_path / 'edit.mp4'}"
    assert cli.main([*options.split(), "--video", str(tmp_path / "source.mp4"), "--stride", "1"]) == 0
    found = video.read(tmp_path / "edit.mp4")
    assert found.frames.shape == (FRAMES, 48, 96, 3) and found.sound is not None
    assert found.frames[:, :, :20].max() < 40 < found.frames[:, :, 30:66].mean()
    capsys.readouterr()
    assert cli.main(options.split()) == 2 and "only of a --video" in capsys.readouterr().err


def test_a_mask_that_is_sent_does_what_it_does_here(server, exported):
    engine = open_clip(exported.repository, "first", threads=1)
    one = EditConfig(prompts=("x",), steps=2, guidance_scale=7.5, inversion_steps=2)
    with Client(server.grpc_url) as client:
        found = client.edit("first", one, source_frames=noise(FRAMES), mask=masks.encoded(mask_of(FRAMES))).frames
    assert_same(found, editing.edit(engine, one, frames=noise(FRAMES), mask=mask_of(FRAMES)))
    free = editing.edit(engine, one, frames=noise(FRAMES))
    assert np.abs(found.astype(int) - free).mean() > 3, "the mask did nothing"
