"""Conditions through the whole chain: exported beside the clips, edited by the engine, served and asked for."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from controls import maps_of, write_adapter, write_controlnet
from exported import FRAMES, SIDE, Exported, export_once, open_base
from safetensors.numpy import load_file
from served import serving

from tav_opt import cli, editing, video
from tav_opt.client import Client
from tav_opt.config import Control, EditConfig, InputError, WorkerConfig
from tav_opt.engines import onnxruntime
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.pytorch import TorchEngine, open_checkpoint
from tav_opt.export import exporting
from tav_opt.export.__main__ import main
from tav_opt.files import write_json
from tav_opt.repository import clips
from tav_opt.serving.failures import UnknownClip
from tav_opt.serving.host.server import Server
from tav_opt.serving.resident import Clips
from tav_opt.video.lossless import encode_mkv

pytestmark = pytest.mark.full
"""Five graphs are exported; the page docs/conditions.md, which is run always, exports two and serves them."""
CONTROLS = (Control(name="pose", scale=0.7, end=0.7), Control(name="depth", scale=1.5))
EDIT = EditConfig(prompts=("a panda is skiing",), steps=3, guidance_scale=7.5, controls=CONTROLS)
MAPS = {one.name: maps_of(FRAMES, SIDE, SIDE, seed) for seed, one in enumerate(CONTROLS)}


@pytest.fixture(scope="module")
def places(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    return {"pose": write_controlnet(shallow, folder / "pose", 1), "depth": write_adapter(shallow, folder / "depth", 2)}


@pytest.fixture(scope="module")
def exported(golden: Path, places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The clip `first`, and networks that came to its base later, by the command."""
    found = export_once(golden, tmp_path_factory.getbasetemp())
    given = [f"--controlnet=pose={places['pose']}", f"--adapter=depth={places['depth']}"]
    assert main([str(found.checkpoint), f"--repository={found.repository}", "--name=first", *given]) == 0
    return found


@pytest.fixture(scope="module")
def engine(exported: Exported) -> ExportedEngine:
    return ExportedEngine.open(exported.version / "clips" / "first", open_base(exported, "onnxruntime", threads=1))


@pytest.fixture(scope="module")
def eager(exported: Exported, places: dict[str, Path]) -> TorchEngine:
    return open_checkpoint(
        exported.checkpoint, controlnets={"pose": places["pose"]}, adapters={"depth": places["depth"]}
    )


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(found.astype(int) - expected)
    assert found.shape == expected.shape and expected.std() > 10
    assert difference.mean() <= 0.05 and difference.max() <= 3, (difference.mean(), difference.max())


def test_a_base_has_a_graph_a_network_and_of_the_unet_one_a_set_of_kinds(
    exported: Exported, places: dict[str, Path]
) -> None:
    told = json.loads((exported.base / "manifest.json").read_text())["added"]
    unets = {"unet_controlnet", "unet_adapter", "unet_controlnet_adapter"}
    assert set(told) == {"hint_pose", "controlnet_pose", "adapter_depth", *unets}
    net = sum(x.nbytes for x in load_file(places["pose"] / "diffusion_pytorch_model.safetensors").values())
    made = [onnx.load(exported.base / f"{name}.onnx").graph.initializer for name in ("hint_pose", "controlnet_pose")]
    assert net <= sum(len(one.raw_data) for found in made for one in found) < 1.01 * net, "each weight once"
    assert all([*told[name]["files"]] == [f"{name}.onnx"] for name in unets), "weights of its own"
    assert all(one["parity"]["error"] <= one["parity"]["tolerance"] for one in told.values())


def test_the_exported_edit_follows_maps_as_eager_pytorch_does(engine: ExportedEngine, eager: TorchEngine) -> None:
    expected = editing.edit(eager, EDIT, maps=MAPS)
    assert_same(editing.edit(engine, EDIT, maps=MAPS), expected)
    plain = editing.edit(engine, replace(EDIT, controls=()))
    assert np.abs(plain.astype(int) - expected).mean() > 1, "the maps do nothing"


def test_memory_of_networks_is_counted_before_they_are_loaded(exported: Exported) -> None:
    fresh = ExportedEngine.open(exported.version / "clips" / "first", open_base(exported, "onnxruntime", threads=1))
    plain, both = fresh.extra_bytes(1), fresh.extra_bytes(1, controls=("pose", "depth"))
    weights = sum((exported.base / f"{kind}_pose.onnx.data").stat().st_size for kind in ("hint", "controlnet"))
    assert both > plain + 3 * (exported.base / "unet.onnx.data").stat().st_size + weights
    assert plain < fresh.extra_bytes(1, controls=("depth",)) < both
    assert both < fresh.extra_bytes(1, controls=("pose", "depth"), frames=2 * FRAMES)


def test_networks_go_with_their_base(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Path(shutil.copytree(exported.repository, tmp_path / "repository"))
    opened: dict[str, weakref.ref[Any]] = {}
    opening = onnxruntime.session

    def session(path: Path, *told: Any, **more: Any) -> Any:
        made = opening(path, *told, **more)
        opened[path.stem] = weakref.ref(made)
        return made

    monkeypatch.setattr(onnxruntime, "session", session)
    held = Clips(repository / exported.version.relative_to(exported.repository), limit=1 << 30, threads=1)
    plain = {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert editing.edit(held.get("first"), replace(EDIT, controls=())).any()
    assert opened.keys() == plain
    assert editing.edit(held.get("first"), EDIT, maps=MAPS).any()
    asked_for = {"hint_pose", "controlnet_pose", "adapter_depth", "unet_controlnet_adapter", "unet_adapter"}
    assert opened.keys() - plain == asked_for, "the last step is told of the adapter alone"
    assert all(one() is not None for one in opened.values())
    clips.remove(repository, "first")
    with pytest.raises(UnknownClip):
        held.get("first")
    gc.collect()
    assert [name for name, one in opened.items() if one() is not None] == []


@pytest.fixture(scope="module")
def server(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of the base as it was; its networks come while it runs, their list last, as an export writes them."""
    folder = tmp_path_factory.mktemp("served")
    repository = Path(shutil.copytree(exported.repository, folder / "repository"))
    (base,) = (repository / "tune_a_video_stream" / "1" / "base").iterdir()
    told = json.loads((base / "manifest.json").read_text())
    write_json(base / "manifest.json", {name: value for name, value in told.items() if name != "added"})
    with serving(repository, WorkerConfig(cache=folder / "cache", batch_requests=2)) as running:
        with Client(running.grpc_url) as client:
            assert client.edit("first", replace(EDIT, controls=())).frames.any()
            with pytest.raises(InputError, match="'pose' has no network; there is none"):
                client.edit("first", EDIT, maps=MAPS)
        write_json(base / "manifest.json", told)
        yield running


def test_the_server_edits_by_maps_that_are_sent(server: Server, engine: ExportedEngine) -> None:
    with Client(server.grpc_url) as client:
        found = client.edit("first", EDIT, maps={"pose": MAPS["pose"], "depth": encode_mkv(MAPS["depth"])})
        assert_same(found.frames, editing.edit(engine, EDIT, maps=MAPS))
        assert [one["name"] for one in found.metadata[0]["controls"]] == ["pose", "depth"]
        plain = client.edit("first", replace(EDIT, controls=()))
        assert_same(plain.frames, editing.edit(engine, replace(EDIT, controls=())))
        inverted = replace(EDIT, controls=(Control(name="depth"),), control_inversion=True)
        for maps in (MAPS["depth"], MAPS["pose"]):  # of which one's inversion is not the other's
            found = client.edit("first", inverted, maps={"depth": maps})
            assert_same(found.frames, editing.edit(engine, inverted, maps={"depth": maps}))


def test_the_server_edits_a_longer_source_by_as_many_maps(server: Server, engine: ExportedEngine) -> None:
    source = maps_of(FRAMES + 3, SIDE, SIDE, 9)
    maps = {name: maps_of(FRAMES + 3, SIDE, SIDE, seed) for seed, name in enumerate(MAPS)}
    config = replace(EDIT, inversion_steps=1)
    with Client(server.grpc_url) as client:
        found = client.edit("first", config, source_frames=source, maps=maps).frames
    assert_same(found, editing.edit(engine, config, frames=source, maps=maps))
    plain = editing.edit(engine, replace(config, controls=()), frames=source)
    assert np.abs(found.astype(int) - plain).mean() > 1, "the maps do nothing"


def test_the_server_refuses_maps_and_attention_control_at_once(server: Server) -> None:
    with Client(server.grpc_url) as client, pytest.raises(InputError, match="'pose' with attention control"):
        client.edit("first", replace(EDIT, keep="motion"), maps=MAPS)


def test_the_server_refuses_maps_that_do_not_fit(server: Server) -> None:
    with Client(server.grpc_url) as client:
        for name, maps, said in (
            ("pose", maps_of(FRAMES + 1, SIDE, SIDE, 0), "takes 4 frames of 64×64"),
            ("pose", maps_of(FRAMES, SIDE, 48, 0), "takes 4 frames of 64×64"),
            ("pose", b"nonsense", "input control_video"),
            ("hand", MAPS["pose"], "'hand' has no network; there is depth, pose"),
        ):
            with pytest.raises(InputError, match=said):
                client.edit("first", replace(EDIT, controls=(Control(name=name),)), maps={name: maps})
        with pytest.raises(InputError, match="scale 11"):
            client.edit("first", replace(EDIT, controls=(Control(name="pose", scale=11),)), maps={"pose": MAPS["pose"]})


def test_commands_follow_maps(
    server: Server, exported: Exported, places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video.write(tmp_path / "pose", MAPS["pose"], 8)
    common = ["--prompt", "a panda is skiing", "--steps", "2", f"--control=pose={tmp_path / 'pose'}"]
    common += ["--control-scale", "0.5"]
    assert cli.main(["edit", str(exported.version / "clips" / "first"), *common, f"--out={tmp_path / 'a'}"]) == 0
    given = ["request", "--clip", "first", "--url", server.grpc_url, *common]
    assert cli.main([*given, f"--out={tmp_path / 'b'}"]) == 0
    place = f"--controlnet=pose={places['pose']}"
    assert cli.main(["edit", str(exported.checkpoint), *common, place, f"--out={tmp_path / 'c'}"]) == 0
    assert_same(video.read(tmp_path / "a").frames, video.read(tmp_path / "c").frames)
    assert_same(video.read(tmp_path / "b").frames, video.read(tmp_path / "c").frames)
    capsys.readouterr()
    assert cli.main(["edit", str(exported.checkpoint), *common, "--out", str(tmp_path / "d.mp4")]) == 2
    assert "control 'pose' has no network; there is none" in capsys.readouterr().err
    assert cli.main(["edit", str(exported.checkpoint), *common, place, "--keep", "background"]) == 2
    assert "'pose' with attention control" in capsys.readouterr().err
    assert cli.main([*given, "--keep", "background"]) == 2
    assert "'pose' with attention control" in capsys.readouterr().err


def test_a_controlnet_of_an_export_before_its_maps_were_seen_apart_is_refused(
    exported: Exported, places: dict[str, Path]
) -> None:
    kept = (exported.base / "manifest.json").read_bytes()
    told = json.loads(kept)
    del told["added"]["hint_pose"], told["added"]["controlnet_pose"]["made_of"]["takes"]
    write_json(exported.base / "manifest.json", told)
    try:
        base = open_base(exported, "onnxruntime", threads=1)
        old = ExportedEngine.open(exported.version / "clips" / "first", base)
        one = replace(EDIT, controls=(Control(name="depth"),), steps=1, inversion_steps=1)
        assert editing.edit(old, one, maps={"depth": MAPS["depth"]}).any(), "the others are as they were"
        with pytest.raises(InputError, match="controlnet_pose of an export that made no hint_pose beside it"):
            editing.edit(old, EDIT, maps=MAPS)
        with pytest.raises(InputError, match="has a controlnet_pose that is made of something else"):
            exporting.export(
                exported.checkpoint, exported.repository, name="first", controlnets={"pose": places["pose"]}
            )
        assert json.loads((exported.base / "manifest.json").read_text()) == told
    finally:
        (exported.base / "manifest.json").write_bytes(kept)


def test_networks_of_a_name_are_not_replaced(
    shallow: Path, exported: Exported, places: dict[str, Path], tmp_path: Path
) -> None:
    other = write_controlnet(shallow, tmp_path / "other", 7)
    with pytest.raises(InputError, match="has a controlnet_pose that is made of something else"):
        exporting.export(exported.checkpoint, exported.repository, name="second", controlnets={"pose": other})
    with pytest.raises(InputError, match="'pose' of another kind"):
        exporting.export(exported.checkpoint, exported.repository, name="second", adapters={"pose": places["depth"]})
    assert not (exported.version / "clips" / "second").exists()
