"""What a model is, told in one line from names and configurations: the weights beside them are rubbish here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tav_opt
from tav_opt import checkpoint, models
from tav_opt.base import configuration
from tav_opt.base.directory import Base, checked_base
from tav_opt.config import InputError


@pytest.fixture
def copy(golden: Path, tmp_path: Path) -> Path:
    """The reference's model, whose weights cannot be read: a message about them would come too late."""
    folder = shutil.copytree(golden / "reference_checkpoint" / "sd", tmp_path / "sd")
    for file in folder.glob("*/*.bin"):
        file.write_bytes(b"rubbish")
    return folder


def configure(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def refused(path: Path, message: str) -> str:
    with pytest.raises(InputError, match=message) as error:
        models.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"in_channels": 9}, r"in_channels = 9, out_channels = 4: this UNet is for inpainting"),
        ({"in_channels": 5}, "takes depth"),
        ({"in_channels": 8}, "edits by instruction"),
        ({"in_channels": 7, "num_class_embeds": 1000}, "upscales"),
        ({"in_channels": 12}, "takes or gives more than latents"),
        ({"in_channels": 3, "out_channels": 6}, "gives more than noise"),
        ({"in_channels": 16, "out_channels": 16}, "UNet and VAE do not belong together: in_channels = 16, latent_c"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time'"),
        ({"class_embed_type": "projection"}, "class_embed_type = 'projection'"),
        ({"num_class_embeds": 10}, "num_class_embeds = 10"),
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256"),
        ({"cross_attention_dim": 1024}, "UNet and text encoder do not belong .* = 1024, hidden_size = 32"),
        ({"cross_attention_dim": [32, 32, 64, 32]}, "UNet and text encoder do not belong together"),
        ({"cross_attention_dim": None}, "cross_attention_dim = None"),
        ({"_class_name": "UNetMotionModel"}, "UNetMotionModel is another kind of UNet"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type = 'UNetMidBlock2DSimpleCrossAttn'"),
        ({"up_block_types": ["KUpBlock2D"]}, "up_block_types has 'KUpBlock2D'"),
    ],
)
def test_unets_of_another_kind(copy, settings, message):
    configure(copy / "unet" / "config.json", **settings)
    refused(copy, message)
    if "belong" not in message:
        with pytest.raises(InputError, match=message):
            models.load_video_unet(copy)


def test_text_to_video_unets_of_the_reference_s_class_name(copy):
    """diffusers has a class of the same name and block names, whose configuration has no flip_sin_to_cos."""
    file = copy / "unet" / "config.json"
    config = json.loads(file.read_text())
    del config["flip_sin_to_cos"]
    file.write_text(json.dumps(config | {"_class_name": "UNet3DConditionModel"}))
    refused(copy, "text-to-video")


@pytest.mark.parametrize(
    "part, settings, message",
    [
        ("vae", {"latent_channels": 16}, "UNet and VAE do not belong together: in_channels = 4, latent_channels = 16"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny is another kind of VAE"),
        ("vae", {"in_channels": 6, "out_channels": 6}, "in_channels = 6"),
        ("vae", {"shift_factor": 0.1159}, "shift_factor = 0.1159"),
        ("vae", {"latents_mean": [0.0] * 4}, "latents_mean"),
        ("vae", {"scaling_factor": None}, "scaling_factor = None"),
        ("vae", {"block_out_channels": 3}, "describes no AutoencoderKL"),
        ("text_encoder", {"hidden_size": 64}, "cross_attention_dim = 32, hidden_size = 64"),
        ("text_encoder", {"model_type": "t5"}, "model_type = 't5' is no CLIP text encoder"),
        ("text_encoder", {"vocab_size": 534}, "535 tokens, vocab_size = 534"),
    ],
)
def test_parts_that_do_not_belong_to_each_other(copy, part, settings, message):
    configure(copy / part / "config.json", **settings)
    refused(copy, message)


@pytest.mark.parametrize("part", ["unet/config.json", "vae/config.json", "text_encoder/config.json"])
@pytest.mark.parametrize("content, message", [("[]", "holds a list"), ("", "not JSON"), ("null", "holds a NoneType")])
def test_configurations_that_are_none(copy, part, content, message):
    (copy / part).write_text(content)
    refused(copy, rf"config\.json.*{message}")


def test_a_scheduler_without_configuration(copy):
    (copy / "scheduler" / "scheduler_config.json").unlink()
    refused(copy, "scheduler_config.json does not exist")
    with pytest.raises(InputError, match=r"scheduler_config\.json does not exist"):
        checked_base(copy, "0" * 64)


def add(name: str):
    return lambda folder: (folder / name).mkdir(parents=True)


def drop(*names: str):
    return lambda folder: [shutil.rmtree(folder / name) for name in names]


def rename(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)


def nest(folder: Path) -> None:
    shutil.move(shutil.move(folder, folder.with_name("moved")), folder / "sd15")


def tuned(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    for name in (checkpoint.DESCRIPTION, checkpoint.VALUES, checkpoint.LATENTS):
        (folder / name).touch()


def single(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "v1-5.ckpt").touch()


@pytest.mark.parametrize(
    "change, message",
    [
        (add("text_encoder_2"), r"holds text_encoder_2/: it has two text encoders \(Stable Diffusion XL\)"),
        (add("transformer"), r"holds transformer/: its denoiser is a transformer"),
        (drop("vae"), "lacks vae/"),
        (drop("tokenizer"), "lacks tokenizer/"),
        (rename("unet", "UNet"), "lacks unet/.*rename UNet/"),
        (rename("vae", "VAE"), "lacks vae/.*rename VAE/"),
        (nest, "sd lacks unet/.*; sd15/ in it looks like one"),
        (tuned, "this is the checkpoint of a tuned clip"),
        (single, r"v1-5\.ckpt in it seems to be a single-file checkpoint: give the file itself"),
    ],
)
def test_directories_that_are_none(copy, change, message):
    change(copy)
    refused(copy, message)


def test_one_part_alone(copy):
    with pytest.raises(InputError, match="one part alone: give the folder that holds all of them"):
        models.load(copy / "unet")


@pytest.mark.parametrize(
    "name",
    ["{}/x.safetensors", "models/sd15.ckpt", "owner/model.safetensors", "x.pt", "https://host/a/b/v1-5.safetensors"],
)
def test_single_files_are_never_taken_for_hub_ids(tmp_path, name):
    """The hub is not asked: its answer would be a riddle."""
    name = name.format(tmp_path)
    if name.startswith("/"):
        Path(name).touch()
    with pytest.raises(InputError, match=r"is a file, where a directory is needed|does not exist|is empty") as error:
        models.load(name)
    assert name in str(error.value)


@pytest.mark.parametrize(
    "name", ["~/nowhere", "./models/x", "/nowhere", "a/b/c", "https://huggingface.co/owner/name", "word"]
)
def test_paths_that_lead_nowhere_are_never_taken_for_hub_ids(name):
    with pytest.raises(InputError, match="neither a directory nor a hub id"):
        models.resolve(name)


@pytest.fixture(scope="module")
def sd(golden: Path) -> Path:
    return golden / "reference_checkpoint" / "sd"


def test_what_a_pipeline_has_besides_is_no_matter(sd, tmp_path):
    folder = shutil.copytree(sd, tmp_path / "SD 1.5")
    for name in ("safety_checker", "feature_extractor", "controlnet", ".git", "logs"):
        (folder / name).mkdir()
    (folder / "model_index.json").write_text("[")
    (folder / "v1-5-pruned.ckpt").touch()
    (folder / "unet" / "config.json").write_bytes(b"\xef\xbb\xbf" + (sd / "unet" / "config.json").read_bytes())
    loaded = models.load(folder)
    assert loaded.vae.config.scaling_factor == 0.18215  # configurations of 2022 have none
    assert Base.at(folder).hash != Base.at(sd).hash  # its configuration differs by a mark


def test_links_of_the_hub_s_cache_are_followed(sd, tmp_path):
    for file in sd.rglob("*.*"):
        if file.is_file():
            link = tmp_path / "snapshots" / "main" / file.relative_to(sd)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    models.load(tmp_path / "snapshots" / "main")
    assert Base.at(tmp_path / "snapshots" / "main").hash == Base.at(sd).hash


def tokens(folder: Path) -> list[list[int]]:
    tokenizer = models.load(folder).tokenizer
    return models.tokenize(tokenizer, ["a panda is skiing", ""]).tolist()


def test_tokenizers_in_every_form_give_the_same_tokens(sd, tmp_path):
    from transformers import CLIPTokenizer

    expected = tokens(sd)
    assert len(expected[0]) == 16
    bare = shutil.copytree(sd, tmp_path / "bare") / "tokenizer"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (bare / name).unlink()  # what says how long it is
    fast = shutil.copytree(sd, tmp_path / "fast") / "tokenizer"
    CLIPTokenizer.from_pretrained(fast).save_pretrained(tmp_path / "new")
    shutil.rmtree(fast)
    shutil.copytree(tmp_path / "new", fast)
    assert sorted(file.name for file in fast.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    long = shutil.copytree(sd, tmp_path / "long")
    configure(long / "tokenizer" / "tokenizer_config.json", model_max_length=512)
    for folder in (bare.parent, fast.parent, long):
        assert tokens(folder) == expected, folder


@pytest.mark.parametrize(
    "name, content", [("vocab.json", None), ("merges.txt", None), ("vocab.json", "{"), ("vocab.json", "[]")]
)
def test_tokenizers_that_are_none(copy, name, content):
    """Without its files there was one of two words, and every prompt the same."""
    (copy / "tokenizer" / name).unlink()
    if content:
        (copy / "tokenizer" / name).write_text(content)
    refused(copy, "tokenizer holds")


def test_native_size_says_what_it_lacks(copy, sd):
    assert Base.at(sd).native_size == 64
    configure(copy / "unet" / "config.json", sample_size=None)
    with pytest.raises(InputError, match="sample_size = None"):
        _ = Base.at(copy).native_size


def test_the_models_of_the_reference_and_the_demo_pass(golden):
    for folder in (golden / "reference_checkpoint" / "sd", golden / "reference_checkpoint" / "tuned"):
        configuration.check(folder)
    configuration.check(Path(tav_opt.__file__).parent / "demo" / "model")
