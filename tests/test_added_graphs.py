"""Graphs that come to a base beside its own: chosen by what the UNet is told, over weights that lie there once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
import torch
from exported import Exported, export_once, open_base, write_other
from torch import Tensor

from tav_opt.about import about
from tav_opt.config import EngineName, InputError
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.export import exporting, graphs, parity
from tav_opt.export.additions import Further
from tav_opt.files import sha256
from tav_opt.models import StableDiffusion
from tav_opt.repository import clips, specs
from tav_opt.repository.pulling import pull
from tav_opt.repository.specs import TensorSpec

FEATURES = "down_intrablock_additional_residuals"


def _shapes(sd: StableDiffusion, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What an adapter adds at the end of each block of the UNet, of frames."""
    _, f, h, w = latents
    widths = enumerate(sd.unet.config.block_out_channels)
    return {f"{FEATURES}.{i}": (f, width, h >> i, w >> i) for i, width in widths}


def _adapted(sd: StableDiffusion, values: dict[str, Tensor], latents: tuple[int, ...]) -> graphs.Graph:
    further = [
        TensorSpec(name=name, shape=("b", *shape), dtype="float32") for name, shape in _shapes(sd, latents).items()
    ]
    return graphs.unet_variant(sd, values, latents, "unet_adapted", further)


ADAPTED = Further(name="unet_adapted", make=_adapted, made_of={"test": "1"})


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def before(exported: Exported) -> dict[str, str]:
    """The revision of the first clip, and the hashes of all files, before a second export adds a graph."""
    told = {path.name: sha256(path) for path in exported.base.iterdir() if path.is_file()}
    return told | {"revision": _clip(exported, "first").revision}


@pytest.fixture(scope="module")
def added(exported: Exported, before: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Exports a second clip on the same base, with one more graph; the error of that."""
    found = dict[str, float]()
    other = write_other(exported, tmp_path_factory.mktemp("other"))
    exporting.export(
        other, exported.repository, further=[ADAPTED], on_graph=lambda name, one: found.update({name: one.error})
    )
    return found


def _clip(exported: Exported, name: str, engine: EngineName = "onnxruntime") -> ExportedEngine:
    return ExportedEngine.open(exported.version / "clips" / name, open_base(exported, engine))


def _told(exported: Exported, sd: StableDiffusion, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    latents = json.loads((exported.base / "manifest.json").read_text())["latents"]
    text = torch.randn(rows, sd.tokenizer.model_max_length, sd.unet.config.cross_attention_dim, generator=generator)
    shapes = _shapes(sd, latents)
    return {"text": text} | {name: torch.randn(rows, *one, generator=generator) for name, one in shapes.items()}


def test_a_second_export_adds_a_graph_whose_weights_are_the_first_ones(
    exported: Exported, before: Mapping[str, str], added: Mapping[str, float]
) -> None:
    assert added.keys() == {"unet_adapted"} and added["unet_adapted"] <= parity.TOLERANCES["unet"].error
    told = json.loads((exported.base / "manifest.json").read_text())
    assert {*told["added"]["unet_adapted"]["files"]} == {"unet_adapted.onnx"}, "weights of its own"
    model = onnx.load(exported.base / "unet_adapted.onnx", load_external_data=False)
    outside = [x for x in model.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for x in outside for entry in x.external_data if entry.key == "location"} == {"unet.onnx.data"}
    weights = (exported.base / "unet.onnx.data").stat().st_size
    assert sum(int(e.value) for x in outside for e in x.external_data if e.key == "length") > 0.9 * weights
    assert os.path.getsize(exported.base / "unet_adapted.onnx") < weights / 2
    now = {path.name: sha256(path) for path in exported.base.iterdir() if path.is_file()}
    changed = {name for name in now if now[name] != before.get(name)}
    assert changed == {"manifest.json", "unet_adapted.onnx"}
    assert _clip(exported, "first").revision == before["revision"]
    assert clips.verify(exported.repository) == []


@pytest.mark.parametrize("engine", ["onnxruntime", "pytorch"])
@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_told_chooses_the_graph(
    exported: Exported, added: Mapping[str, float], engine: EngineName, rows: int
) -> None:
    eager = open_checkpoint(exported.checkpoint)
    clip = _clip(exported, "first", engine)
    latents = eager.inverted_latents.expand(rows, -1, -1, -1, -1)
    told = _told(exported, eager.sd, rows)
    plain = eager.predict(latents, 301, told["text"])
    expected = eager.predict(latents, 301, told)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(clip.predict(latents, 301, told), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(clip.predict(latents, 301, told["text"]), plain, atol=1e-3, rtol=0)
    torch.testing.assert_close(clip.predict(latents, 301, {"text": told["text"]}), plain, atol=1e-3, rtol=0)
    with pytest.raises(InputError, match=r"no UNet that takes mid.* \(unet_adapted takes down_intrablock.*0,"):
        clip.predict(latents, 301, {"text": told["text"], "mid": plain})


def test_an_added_graph_is_loaded_when_it_is_first_asked_for(exported: Exported, added: Mapping[str, float]) -> None:
    clip = _clip(exported, "first")
    eager = open_checkpoint(exported.checkpoint)
    told = _told(exported, eager.sd, 1)
    weights = (exported.base / "unet.onnx.data").stat().st_size
    needed = clip.extra_bytes(1, told=told)
    assert needed > clip.extra_bytes(1) + weights
    clip.predict(eager.inverted_latents, 301, told["text"])
    assert clip.extra_bytes(1, told=told) > clip.extra_bytes(1) + weights
    clip.predict(eager.inverted_latents, 301, told)
    assert clip.extra_bytes(1, told=told) < needed - weights


def test_info_tells_what_an_added_graph_takes(exported: Exported, added: Mapping[str, float]) -> None:
    memory = about(exported.version / "clips" / "first")["memory_bytes"]
    weights = (exported.base / "unet.onnx.data").stat().st_size
    assert {*memory} == {"loaded", "added by an edit", "with unet_adapted"}
    assert memory["with unet_adapted"] > 2 * 0.9 * weights
    own = sum((exported.base / f"{name}.onnx.data").stat().st_size for name in specs.read(exported.base))
    assert 2 * own < memory["loaded"] < 2 * own + 2 * weights, "what was added is loaded later"


def test_another_graph_of_the_name_is_refused_and_the_same_is_left(
    exported: Exported, added: Mapping[str, float]
) -> None:
    stamp = (exported.base / "unet_adapted.onnx").stat().st_mtime_ns
    exporting.export(exported.checkpoint, exported.repository, name="third", further=[ADAPTED])
    assert (exported.base / "unet_adapted.onnx").stat().st_mtime_ns == stamp
    another = Further(name="unet_adapted", make=_adapted, made_of={"test": "2"})
    with pytest.raises(InputError, match="has a unet_adapted that is made of something else"):
        exporting.export(exported.checkpoint, exported.repository, name="fourth", further=[another])
    assert not (exported.version / "clips" / "fourth").exists()


def test_added_graphs_are_verified_and_pulled(exported: Exported, added: Mapping[str, float], tmp_path: Path) -> None:
    pull(exported.repository.as_uri(), tmp_path / "pulled")
    base = next((tmp_path / "pulled").glob("*/1/base/*"))
    assert (base / "unet_adapted.onnx").is_file() and clips.verify(tmp_path / "pulled") == []
    with (base / "unet_adapted.onnx").open("ab") as file:
        file.write(b"\0")
    assert clips.verify(tmp_path / "pulled") == [f"{base / 'unet_adapted.onnx'}: missing or altered"]
    engine = _clip(exported, "first")
    with (exported.base / "unet_adapted.onnx").open("r+b") as file:
        kept = file.read()
        file.truncate(0)
    try:
        text = engine.encode_text("a cat")
        assert engine.predict(engine.inverted_latents, 301, text).isfinite().all()
        told = _told(exported, open_checkpoint(exported.checkpoint).sd, 1)
        with pytest.raises(InputError, match=r"unet_adapted.onnx is missing or altered"):
            engine.predict(engine.inverted_latents, 301, told)
    finally:
        (exported.base / "unet_adapted.onnx").write_bytes(kept)


def test_specs_of_a_base_are_its_own(exported: Exported, added: Mapping[str, float]) -> None:
    assert "unet_adapted" not in specs.read(exported.base) and {*specs.added(exported.base)} == {"unet_adapted"}
