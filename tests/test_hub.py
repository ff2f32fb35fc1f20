"""What is fetched from the hub, and in which order: a server that answers as the hub does, on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import layouts
import pytest
import torch
from hub import Hub, serving
from huggingface_hub import constants

from tav_opt import models
from tav_opt.base.directory import Base, resolve
from tav_opt.config import InputError
from tav_opt.metrics.clip_encoder import DEMO, ClipEncoder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with serving(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def base(golden: Path) -> Path:
    return golden / "reference_checkpoint" / "sd"


def publish(hub: Hub, base: Path, layout: str) -> Path:
    """A repository `owner/sd` with much that is not needed."""
    folder = layouts.lay_out(base, hub.root / "sd", layout)
    for name in ("v1-5-pruned.ckpt", "README.md", "unet/flax.msgpack", "safety_checker/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 99)
    return folder


def weights_of(names: list[str]) -> list[str]:
    return sorted(name for name in names if not name.endswith((".json", ".txt")))


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layout_is_fetched_whole_and_nothing_else(hub, base, layout, caplog):
    folder = publish(hub, base, layout)
    path = models.resolve("owner/sd")
    assert Base.at(path).hash == Base.at(folder).hash
    models.load(path)
    there = [file.relative_to(folder).as_posix() for part in layouts.PARTS for file in (folder / part).glob("*")]
    kind = (".bin", ".safetensors")
    assert weights_of(hub.fetched) == sorted(name for name in there if name.endswith(kind))
    assert len(hub.fetched) == len(set(hub.fetched))
    first = min(hub.fetched.index(name) for name in weights_of(hub.fetched))
    assert "unet/config.json" in hub.fetched[:first] and "vae/config.json" in hub.fetched[:first]
    said = [record.getMessage() for record in caplog.records if record.name == "tav_opt.base.hub"]
    assert len(said) == 1 and "model owner/sd: fetching 0.00 GB from the hub: unet/" in said[0]


def test_of_several_variants_one_is_fetched(hub, base):
    folder = publish(hub, base, "safetensors")
    for other in ("fp16 safetensors", "bin", "fp16 bin", "bin shards"):
        shutil.copytree(layouts.lay_out(base, hub.root / other, other), folder, dirs_exist_ok=True)
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.non_ema.bin")
    models.resolve("owner/sd")
    assert weights_of(hub.fetched) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_models_that_cannot_be_tuned_are_refused_before_their_weights_are_fetched(hub, base):
    folder = publish(hub, base, "safetensors")
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    with pytest.raises(InputError, match="inpainting"):
        models.resolve("owner/sd")
    assert hub.fetched and not weights_of(hub.fetched)


def test_repositories_of_other_kinds_are_refused_before_anything_is_fetched(hub, base):
    folder = publish(hub, base, "safetensors")
    (folder / "text_encoder_2").mkdir()
    (folder / "text_encoder_2" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"owner/sd holds text_encoder_2/.*Stable Diffusion XL"):
        models.resolve("owner/sd")
    (hub.root / "single").mkdir()
    (hub.root / "single" / "v1-5.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"owner/single lacks unet/.*v1-5\.safetensors in it seems to be a single"):
        models.resolve("owner/single")
    assert not hub.fetched


@pytest.mark.parametrize("left", ["shard", "weights"])
def test_a_repository_that_lacks_weights_says_which(hub, base, left):
    folder = publish(hub, base, "safetensors shards")
    shard = sorted((folder / "vae").glob("*-of-*"))[0]
    if left == "shard":
        shard.unlink()
        message = f"lacks {shard.name}, one of the"
    else:
        for file in (folder / "vae").glob("diffusion*"):
            file.unlink()
        message = "owner/sd: vae/ holds no weights"
    with pytest.raises(InputError, match=message):
        models.resolve("owner/sd")
    assert not weights_of(hub.fetched)


def test_nothing_is_fetched_twice_and_the_cache_serves_without_the_hub(hub, base, monkeypatch, caplog):
    publish(hub, base, "safetensors shards")
    path = models.resolve("owner/sd")
    hub.fetched.clear()
    caplog.clear()
    assert models.resolve(Path("owner/sd")) == path and not hub.fetched and not caplog.records
    for name, value in (("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")):
        monkeypatch.setattr(constants, name, value)
        assert models.resolve("owner/sd") == path
    models.load("owner/sd")
    shard = sorted((path / "unet").glob("*-of-*"))[0]
    shard.unlink()
    with pytest.raises(InputError, match=rf"lacks {shard.name}.*in the cache; the hub does not answer"):
        models.resolve("owner/sd")


@pytest.mark.parametrize(
    "name, message",
    [
        ("none", "'owner/none' is no directory, and the hub does not give it: no repository has this name"),
        ("gated", "accept its terms at https://huggingface.co/owner/gated, then `hf auth login`"),
        ("broken", "the hub does not give it: Server error '500"),
    ],
)
def test_repositories_that_are_not_to_be_had(hub, name, message):
    with pytest.raises(InputError, match=message) as error:
        models.resolve(f"owner/{name}")
    assert "\n" not in str(error.value)


def test_a_network_is_fetched_in_one_format_and_serves_from_the_cache(hub, monkeypatch, caplog):
    """As CLIP lies on the hub: one network, in every format there is."""
    folder = shutil.copytree(DEMO, hub.root / "clip")
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md", "onnx/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 99)
    path = resolve("owner/clip", network=True)
    assert weights_of(hub.fetched) == ["model.safetensors"] and "tokenizer.json" in hub.fetched
    assert "fetching" in caplog.text and ClipEncoder.open("owner/clip").name == "owner/clip"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("owner/clip", network=True) == path
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no weights.*in the cache; the hub does not answer"):
        resolve("owner/clip", network=True)


def test_a_network_without_weights_is_refused(hub):
    (hub.root / "none").mkdir()
    (hub.root / "none" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="owner/none holds no weights"):
        resolve("owner/none", network=True)
