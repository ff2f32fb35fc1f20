"""Attention control exported, in the engines of exported clips, and through the real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exported import Exported, export_once, open_base
from served import Wire, raw, serving

from tav_opt import cli, editing
from tav_opt.client import Client
from tav_opt.config import EditConfig, EngineName, InputError, WorkerConfig
from tav_opt.contract import to_tensors
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.export import __main__ as command
from tav_opt.export import parity
from tav_opt.files import read_json
from tav_opt.serving.host.server import Server

KEPT = EditConfig(prompts=("a dog is skiing",), steps=3, guidance_scale=3.0, keep="background", word_weights=("dog:2",))


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The first clip once more, on its base with the further graph."""
    found = export_once(golden, tmp_path_factory.getbasetemp())
    arguments = [str(found.checkpoint), "--repository", str(found.repository), "--name", "first", "--attention-control"]
    assert command.main(arguments) == 0
    return found


def opened(exported: Exported, engine: EngineName) -> ExportedEngine:
    return ExportedEngine.open(exported.version / "clips" / "first", open_base(exported, engine, threads=1))


def test_the_graph_is_listed_with_its_parity_and_shares_the_weights(exported: Exported) -> None:
    told = read_json(exported.base / "manifest.json")["added"]["unet_controlled"]
    assert told["parity"]["error"] <= parity.TOLERANCES["unet"].error
    assert {*told["files"]} == {"unet_controlled.onnx"}
    assert (exported.base / "unet_controlled.onnx").stat().st_size < (exported.base / "unet.onnx.data").stat().st_size


@pytest.mark.parametrize("engine", ["onnxruntime", "pytorch"])
@pytest.mark.parametrize("settings", [{}, {"keep": "motion"}, {"keep": None}], ids=["background", "motion", "weights"])
def test_engines_edit_as_eager_pytorch_does(exported: Exported, engine: EngineName, settings: dict) -> None:
    config = replace(KEPT, **settings)
    expected = editing.edit(open_checkpoint(exported.checkpoint), config)
    found = editing.edit(opened(exported, engine), config)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.02, (difference.max(), difference.mean())


@pytest.fixture(scope="module")
def server(exported: Exported, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of a base that got the graph while it was served, as an export adds it: the graph first, its manifest last."""
    bare = export_once(golden, tmp_path_factory.getbasetemp())
    cache = tmp_path_factory.mktemp("control") / "cache"
    with serving(bare.repository, WorkerConfig(cache=cache, batch_requests=2)) as running:
        with Client(running.grpc_url) as client:
            with pytest.raises(InputError, match="--attention-control"):
                client.edit("first", KEPT)
            shutil.copy(exported.base / "unet_controlled.onnx", bare.base)
            shutil.copy(exported.base / "manifest.json", bare.base / "manifest.new")
            (bare.base / "manifest.new").replace(bare.base / "manifest.json")
            client.edit("first", KEPT)
        yield running


def test_the_server_keeps_what_is_asked_for(server: Server, exported: Exported, tmp_path: Path) -> None:
    expected = editing.edit(opened(exported, "onnxruntime"), KEPT)
    plain = replace(KEPT, keep=None, word_weights=())
    with Client(server.grpc_url) as client:
        found = client.edit("first", KEPT)
        assert np.abs(found.frames.astype(int) - expected).max() <= 1
        assert (found.metadata[0]["keep"], found.metadata[0]["direct_inversion"]) == ("background", True)
        assert not np.array_equal(client.edit("first", plain).frames, found.frames)
        assert np.array_equal(client.edit("first", KEPT).frames, found.frames), "the kept trajectory gives the same"
    out = tmp_path / "kept.gif"
    asked = ["request", "--url", server.grpc_url, "--clip", "first", "--prompt", *KEPT.prompts, "--steps", "3"]
    assert cli.main([*asked, "--guidance", "3", "--keep", "background", "--out", str(out)]) == 0
    assert out.is_file()


def test_edits_with_and_without_control_share_a_worker(server: Server) -> None:
    plain = replace(KEPT, keep=None, word_weights=())
    with Client(server.grpc_url) as client, Client(server.grpc_url) as other:
        alone = [client.edit("first", config).frames for config in (KEPT, plain)]
        with client.stream("first", KEPT) as one, other.stream("first", plain) as two:
            together = [one.result().frames, two.result().frames]
    for found, expected in zip(together, alone, strict=True):
        assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts": ("a dog and a dog",), "word_weights": (), "blend_words": ("dog",)}, "say which, dog#1, dog#2"),
        ({"word_weights": ("lion:2",)}, "'lion' is no word of the prompts"),
        ({"keep": "sound"}, "keep 'sound' is not background or motion"),
        ({"replace_self": 2.0}, "replace self 2.0"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_server(server: Server, settings: dict, words: str) -> None:
    with Wire(server.grpc_url) as wire:
        answer = wire.ask(raw(to_tensors("first", replace(KEPT, **settings))))
    assert answer.status == "INVALID_ARGUMENT" and words in answer.message


def test_a_base_without_the_graph_says_how_to_get_it(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    bare = export_once(golden, tmp_path_factory.getbasetemp())
    with pytest.raises(InputError, match="--attention-control"):
        editing.edit(opened(bare, "onnxruntime"), KEPT)
