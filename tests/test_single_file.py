"""Single-file checkpoints: the same model as the directory that they are of; and every way one can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import owned
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from tav_opt import cli, models
from tav_opt.base import hub, single_file
from tav_opt.base.directory import Base
from tav_opt.base.image_model import ImageModel
from tav_opt.config import BaseConfig, InputError


@pytest.fixture(scope="module")
def sd(golden: Path) -> Path:
    return golden / "reference_checkpoint" / "sd"


@pytest.fixture(scope="module")
def tensors(sd: Path) -> dict[str, torch.Tensor]:
    return owned.single_file(owned.pipeline(sd))


@pytest.fixture(scope="module", params=["safetensors", "ckpt"])
def file(request: pytest.FixtureRequest, tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / f"v1-5.{request.param}"
    if request.param == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 840000, "epoch": 3}, path)
    else:
        save_file(tensors, path)
    return path


def load(file: Path, sd: Path | None, **added: object) -> models.StableDiffusion:
    return models.load(BaseConfig(model=str(file), model_config=None if sd is None else str(sd), **added))


def test_a_single_file_is_what_its_directory_is(file, sd):
    """The directory's values are the truth, through names that are CompVis's own."""
    ours, theirs = load(file, sd), models.load(sd)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(theirs, part).state_dict()
        found = {name: value for name, value in getattr(ours, part).state_dict().items() if "attn_temp" not in name}
        assert all(torch.equal(value, expected[name]) for name, value in found.items()), part
    assert models.tokenize(ours.tokenizer, "a panda").equal(models.tokenize(theirs.tokenizer, "a panda"))
    assert ours.schedule == theirs.schedule


def test_diffusers_own_pipeline_reads_the_same(sd, tensors, tmp_path):
    save_file(tensors, tmp_path / "own.safetensors")
    folder = shutil.copytree(sd, tmp_path / "sd")
    owned.pipeline(sd).save_pretrained(folder)  # with the model_index.json that it needs
    theirs = StableDiffusionPipeline.from_single_file(
        tmp_path / "own.safetensors", config=str(folder), local_files_only=True, safety_checker=None
    )
    ours = ImageModel.load(Base.at(BaseConfig(model=str(tmp_path / "own.safetensors"), model_config=str(sd))))
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(theirs, part).state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in getattr(ours, part).state_dict().items()), part


def test_half_precision_is_read(tmp_path, sd, tensors):
    save_file({name: value.half() for name, value in tensors.items()}, tmp_path / "half.safetensors")
    found, whole = load(tmp_path / "half.safetensors", sd).unet.state_dict(), models.load(sd).unet.state_dict()
    assert all(
        value.dtype == torch.float32 and (value - whole[name]).abs().max() < 1e-2
        for name, value in found.items()
        if "attn_temp" not in name
    )


def test_configurations_come_from_the_hub_s_cache(file, sd, monkeypatch):
    monkeypatch.setattr(hub, "fetch_configurations", {single_file.V1: sd, "owner/other": sd}.__getitem__)
    here = Base.at(file)
    assert here.folder == sd and here.hash == Base.at(BaseConfig(model=str(file), model_config="owner/other")).hash


def test_the_identity_is_of_file_and_configurations(file, sd, tmp_path):
    copy = shutil.copytree(sd, tmp_path / "sd")
    moved = Path(shutil.copy(file, tmp_path / f"other{file.suffix}"))
    first = Base.at(BaseConfig(model=str(file), model_config=str(sd)))
    again = Base.at(BaseConfig(model=str(moved), model_config=str(copy)))
    assert first.hash == again.hash and first.additions == {"model_config": str(sd.resolve())}
    assert first.hash != Base.at(BaseConfig(model=str(file), model_config=str(sd), vae=str(sd))).hash
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"}))
    assert first.hash != Base.at(BaseConfig(model=str(file), model_config=str(copy))).hash
    assert first.native_size == 64


def without(word: str):
    return lambda tensors: {name: value for name, value in tensors.items() if word not in name}


def but(**changes: torch.Tensor):
    return lambda tensors: {**tensors, **changes}


CONV = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda _: {"a": torch.ones(2)}, r"is no Stable Diffusion checkpoint: no model\.diffusion_model\.… .* but a"),
        (lambda _: {"lora_unet_x.lora_down.weight": torch.ones(2)}, "is a LoRA: give a model, and it with --lora"),
        (but(**{"conditioner.x": torch.ones(2)}), "is of Stable Diffusion XL"),
        (without("first_stage_model"), "holds no VAE: give one with --vae"),
        (without("cond_stage_model"), "holds no text encoder"),
        (without("middle_block.1.proj_in.weight"), "tensors of its UNet or VAE are missing"),
        (without("layers.1.mlp.fc1.weight"), "text_encoder lacks encoder.layers.1.mlp.fc1.weight"),
        (without("decoder.conv_in.weight"), "tensors of its UNet or VAE are missing"),
        (but(**{"model.diffusion_model.input_blocks.30.0.op.weight": torch.ones(3)}), "549063 values, theirs 549060"),
        (
            but(**{CONV: torch.ones(3, 3)}),
            r"conv_in\.weight expected shape .*\[16, 4, 3, 3\]\), but got .*\[3, 3\]\)\.$",
        ),
        (but(**{CONV: torch.full((16, 4, 3, 3), torch.nan)}), "NaN or infinite"),
    ],
)
def test_files_that_are_none_or_lack_something(change, message, tensors, sd, tmp_path):
    save_file(change(tensors), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path / "x.safetensors", sd)
    assert "\n" not in str(error.value) and "x.safetensors" in str(error.value)


def test_a_vae_of_its_own_stands_in_for_one_that_is_missing(tensors, sd, tmp_path):
    save_file(without("first_stage_model")(tensors), tmp_path / "x.safetensors")
    vae = load(tmp_path / "x.safetensors", sd, vae=str(sd / "vae")).vae
    assert torch.equal(vae.decoder.conv_in.weight, models.load(sd).vae.decoder.conv_in.weight)


def test_offline_it_says_what_to_give(tensors, tmp_path, monkeypatch):
    def unreachable(hub_id: str) -> Path:
        raise InputError(f"{hub_id} is not to be had")

    monkeypatch.setattr(hub, "fetch_configurations", unreachable)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(
        InputError, match=r"no configurations and tokenizer in it: give --model-config, .*not to be had"
    ):
        load(tmp_path / "x.safetensors", None)
    second = without("cond_stage_model")(tensors) | {"cond_stage_model.model.token_embedding.weight": torch.ones(3, 4)}
    save_file(second, tmp_path / "v2.safetensors")
    with pytest.raises(InputError, match=r"of Stable Diffusion 2\.x, whose kinds predict noise or v.*--model-config"):
        load(tmp_path / "v2.safetensors", None)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_nothing_but_tensors_is_unpickled(tensors, sd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": tensors, "callbacks": Evil()}, "evil.ckpt")
    torch.save([1, 2], "list.ckpt")
    Path("page.ckpt").write_text("<html>")
    for name, word in {
        "evil": "nothing else is ever unpickled",
        "list": "no dictionary|not a dic",
        "page": "text",
    }.items():
        with pytest.raises(InputError, match=word):
            load(Path(f"{name}.ckpt"), sd)
    assert not Path("pwned").exists()
    status = cli.main(f"tune --model evil.ckpt --model-config {sd} --prompt x --video {sd} --out ckpt".split())
    assert status == 2 and capsys.readouterr().err.count("\n") == 1 and not Path("ckpt").exists()


def test_what_is_said_of_a_configuration(sd, file):
    for model, config, message in (
        (sd, str(sd), "is for single files, and .* is none"),
        (file, "nowhere", "model config 'nowhere' is neither a directory nor a hub id"),
        (file, str(sd / "unet"), "one part alone"),
    ):
        with pytest.raises(InputError, match=message):
            Base.at(BaseConfig(model=str(model), model_config=config))
