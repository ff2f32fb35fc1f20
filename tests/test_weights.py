"""Weights in every layout that people have, and every file that stands in their place."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import layouts
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tav_opt import models
from tav_opt.base import weights
from tav_opt.base.directory import Base
from tav_opt.config import InputError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167536\n"
HASH = "044578b9a5b87cefb73d8c21b92ae63bcd0faab94f84b635ecc84264f8b55a00"
"""Of the reference's model, as the first release computed it: checkpoints in the field name it."""


@pytest.fixture(scope="module")
def base(golden: Path) -> Path:
    return golden / "reference_checkpoint" / "sd"


@pytest.fixture(scope="module")
def plain(base: Path) -> models.StableDiffusion:
    return models.load(base)


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "sd")


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layout_loads_whole(plain, base, tmp_path, layout, caplog):
    sd = models.load(layouts.lay_out(base, tmp_path / "sd", layout))
    expected = (lambda value: value.half().float()) if "fp16" in layout else (lambda value: value)
    for part in ("vae", "text_encoder"):
        theirs = getattr(plain, part).state_dict()
        for name, value in getattr(sd, part).state_dict().items():
            assert torch.equal(value, expected(theirs[name])), f"{part} {name}"
    ours = sd.unet.state_dict()
    for name, value in layouts.tensors(base / "unet").items():
        assert torch.equal(ours[name], expected(value)), name
    said = [record.getMessage() for record in caplog.records if record.name.startswith("tav_opt")]
    assert len(said) == ("fp16" in layout), said
    assert all("half precision" in line and "unet/diffusion_pytorch_model.fp16" in line for line in said)


def test_older_names_of_an_index_of_half_precision(base, tmp_path):
    unet = layouts.lay_out(base, tmp_path / "sd", "fp16 safetensors shards") / "unet"
    index = unet / "diffusion_pytorch_model.fp16.safetensors.index.json"
    listed = json.loads(index.read_text())
    for name in set(listed["weight_map"].values()):
        (unet / name).rename(unet / name.replace(".fp16", "").replace(".saf", ".fp16.saf"))
    listed["weight_map"] = {
        k: v.replace(".fp16", "").replace(".saf", ".fp16.saf") for k, v in listed["weight_map"].items()
    }
    index.unlink()
    (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(listed))
    assert weights.read(weights.files(unet)).keys() == layouts.tensors(base / "unet").keys()


def test_whole_before_half_and_safetensors_before_bin():
    order = [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.bin.index.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.fp16.bin",
        "diffusion_pytorch_model.bf16.safetensors",
    ]
    others = ["config.json", "diffusion_pytorch_model.non_ema.safetensors", "diffusion_flax_model.msgpack"]
    for first in range(len(order)):
        assert weights.choose([*others, *reversed(order[first:])], "unet") == order[first]
    with pytest.raises(InputError, match=r"unet holds no weights .*non_ema\.safetensors cannot be taken"):
        weights.choose(others, "unet")


@pytest.mark.parametrize("part", layouts.PARTS)
def test_a_missing_shard_is_named(base, tmp_path, part):
    folder = layouts.lay_out(base, tmp_path / "sd", "safetensors shards") / part
    shard = sorted(folder.glob("*-of-*"))[-1]
    shard.rename(folder / f"{shard.name}.incomplete")
    for function in (models.load, lambda path: Base.at(path).hash):
        with pytest.raises(InputError, match=f"lacks {shard.name}, one of the"):
            function(tmp_path / "sd")


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"x": "../x.bin"}}', '{"weight_map": 3}', "{", POINTER]
)
def test_an_index_that_is_none(copy, index):
    (copy / "unet" / "diffusion_pytorch_model.bin").unlink()
    (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"index\.json"):
        models.load(copy)


@pytest.mark.parametrize(
    "left",
    [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.incomplete",
        "model.ckpt",
    ],
)
def test_what_lies_there_instead_of_weights_is_named(copy, left):
    (copy / "unet" / "diffusion_pytorch_model.bin").rename(copy / "unet" / left)
    with pytest.raises(InputError, match=f"unet holds no weights .*{left}"):
        models.load(copy)


def test_hashes_are_those_of_the_first_release(base, copy):
    assert Base.at(base).hash == HASH
    save_file(layouts.tensors(base / "unet"), copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert Base.at(copy).hash == HASH  # a variant beside what was tuned on changes nothing


def test_hashes_are_of_all_shards_and_of_the_precision(base, tmp_path):
    kinds = ("safetensors", "fp16 safetensors", "safetensors shards")
    assert len({Base.at(layouts.lay_out(base, tmp_path / kind, kind)).hash for kind in kinds}) == 3
    folder = tmp_path / "safetensors shards"
    before = Base.at(folder).hash
    for part in layouts.PARTS:
        shard = sorted((folder / part).glob("*-of-*"))[-1]
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        assert Base.at(folder).hash != before, shard
        before = Base.at(folder).hash


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


def cut(path: Path, **options: bool) -> None:
    torch.save({"a": torch.zeros(99)}, path, **options)
    path.write_bytes(path.read_bytes()[:-40])


class Plain(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


IMPOSTORS = {
    "git-lfs pointer": (lambda path: path.write_text(POINTER), "git lfs pull"),
    "empty": (lambda path: path.touch(), "is empty"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"), "server's page"),
    "answer": (lambda path: path.write_text('{"error": "Invalid credentials"}'), "server's page"),
    "words": (lambda path: path.write_text("Entry not found"), "corrupt"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(999)), "corrupt"),
    "zip": (zipped, "corrupt|PyTorch"),
    "numpy": (lambda path: np.save(path.open("wb"), np.zeros(3)), "corrupt"),
    "numpy archive": (lambda path: np.savez(path.open("wb"), a=np.zeros(3)), "corrupt|PyTorch"),
    "TorchScript": (lambda path: torch.jit.script(Plain()).save(str(path)), "corrupt|PyTorch"),
    "module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), r"more than tensors \(torch|PyTorch"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"x": Evil()})), "more than tensors|corrupt"),
    "old pickle": (lambda path: path.write_bytes(pickle.dumps([3], 0)), "not a dictionary|corrupt"),
    "list": (lambda path: torch.save([torch.zeros(1)], path), "not a dictionary|PyTorch"),
    "nested": (lambda path: torch.save({"state_dict": {"a": torch.zeros(1)}}, path), "not a dictionary|PyTorch"),
    "cut": (cut, "corrupt|PyTorch"),
    "cut, older": (lambda path: cut(path, _use_new_zipfile_serialization=False), "corrupt|PyTorch"),
    "directory": (lambda path: path.mkdir(), "it is no plain file"),
    "dead link": (lambda path: path.symlink_to("../blobs/gone"), "is a link to ../blobs/gone, which does not exist"),
}  # fmt: skip


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("kind", [".bin", ".safetensors"])
@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_are_named_and_no_advice_to_unpickle_is_passed_on(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    make, message = IMPOSTORS[name]
    path = tmp_path / f"diffusion_pytorch_model{kind}"
    make(path)
    with pytest.raises(InputError, match=message) as error:
        weights.load_tensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert "weights_only" not in str(error.value) and "trust" not in str(error.value)
    assert not Path("pwned").exists()


def test_files_of_the_other_format_are_told_their_suffix(base, tmp_path):
    shutil.copy(base / "unet" / "diffusion_pytorch_model.bin", tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"should end in \.bin"):
        weights.load_tensors(tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.bin")
    with pytest.raises(InputError, match=r"should end in \.safetensors"):
        weights.load_tensors(tmp_path / "model.bin")
    save_file({"a": torch.zeros(99)}, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 100)
    with pytest.raises(InputError, match="cut short"):
        weights.load_tensors(tmp_path / "cut.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights_is_one_line(copy):
    (copy / "vae" / "diffusion_pytorch_model.bin").chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        models.load(copy)


@pytest.mark.parametrize(
    "part",
    ["unet", "vae", "text_encoder", "unet/config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"],
)
def test_pointers_are_named_wherever_they_lie(copy, part):
    path = copy / part
    file = next(path.glob("*.bin")) if path.is_dir() else path
    file.write_text(POINTER)
    with pytest.raises(InputError, match=f"{file.name} is a git-lfs pointer"):
        models.load(copy)


@pytest.mark.parametrize(
    "part, value, layout",
    [
        ("unet", float("nan"), "bin"),
        ("vae", float("inf"), "fp16 safetensors shards"),
        ("text_encoder", -float("inf"), "safetensors"),
    ],
)
def test_values_that_are_no_numbers_are_named_with_file_and_tensor(copy, part, value, layout):
    values = layouts.tensors(copy / part)
    name = [name for name, tensor in values.items() if tensor.is_floating_point()][7]
    values[name].view(-1)[1] = value
    layouts.write(values, copy / part, layout)
    with pytest.raises(InputError, match=rf"{part}/\S+\.(bin|safetensors): 1 of the \d+ values of {name} are NaN"):
        models.load(copy)


def test_large_values_of_half_precision_are_numbers(copy):
    values = layouts.tensors(copy / "unet")
    values["conv_in.bias"] = torch.full_like(values["conv_in.bias"], 6e4)  # their sum is beyond float16
    layouts.write(values, copy / "unet", "fp16 safetensors")
    assert models.load(copy).unet.conv_in.bias.max() > 59999


def test_tensors_that_a_text_encoder_lacks_are_named(copy, caplog):
    """They were drawn at random once."""
    values = layouts.tensors(copy / "text_encoder")
    del values["text_model.final_layer_norm.weight"]
    layouts.write(values, copy / "text_encoder", "safetensors")
    with pytest.raises(InputError, match=r"text_encoder: weights do not fit .*final_layer_norm\.weight"):
        models.load(copy)
    assert not caplog.records


@pytest.mark.parametrize("part", layouts.PARTS)
def test_weights_of_another_size_do_not_fit(copy, part):
    values = layouts.tensors(copy / part)
    name = [name for name, tensor in values.items() if tensor.is_floating_point()][1]
    values[name] = torch.zeros(3, 5)
    layouts.write(values, copy / part, "safetensors")
    with pytest.raises(
        InputError, match=f"{part}: weights do not fit the configuration.*{name.split('.')[-1]}"
    ) as error:
        models.load(copy)
    assert "\n" not in str(error.value)
