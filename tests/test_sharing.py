"""A clip that is pushed, and what others make of it: through huggingface_hub, to a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exported import Exported, export_once
from hub import Hub, serving
from huggingface_hub import ModelCard, constants
from PIL import Image

from tav_opt import about, checkpoint, cli, sharing, video
from tav_opt.clip_folder import ClipFolder, hub_id_of
from tav_opt.config import InputError
from tav_opt.files import read_json
from tav_opt.memory import eager, outline
from tav_opt.models import load

FILES = ("values.safetensors", "latents.safetensors", "checkpoint.json")
FRAMES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path) as running:
        yield running


@pytest.fixture
def tuned(exported: Exported, tmp_path: Path) -> Path:
    """A checkpoint as `tav-opt tune` leaves it: settings with a path in them, and pictures."""
    clip = checkpoint.load(exported.checkpoint)
    settings = {"steps": 500, "lr": 3e-5, "trainable": ["attn1.to_q"], "source": {"video": "/home/someone/me.mp4"}}
    clip = replace(clip, info=replace(clip.info, prompt="a man | is <b>skiing</b>"))
    checkpoint.save(clip, tmp_path / "ckpt", settings=settings)
    for name in ("preview.png", "loss.png"):
        video.write_png(tmp_path / "ckpt" / name, FRAMES[0])
    (tmp_path / "ckpt" / "resume.safetensors").write_bytes(b"gigabytes that are nobody's business")
    return tmp_path / "ckpt"


# There and back.


def test_a_pushed_clip_edits_and_exports_elsewhere_as_here(hub, tuned, exported, tmp_path, capsys):
    gif = tmp_path / "edit one.gif"
    video.write(gif, FRAMES, 8)
    options = ["--base", "owner/sd", "--license", "creativeml-openrail-m", "--picture", str(gif)]
    assert cli.main(["push", str(tuned), "owner/skiing", *options]) == 0
    assert capsys.readouterr().out.strip() == f"{hub.url}/owner/skiing"
    (files,) = hub.pushed
    assert set(files) == {
        "README.md", "preview.png", "loss.png", gif.name, *FILES,
    }  # fmt: skip
    assert not any(b"someone" in content or str(tmp_path).encode() in content for content in files.values())
    described = json.loads(files["checkpoint.json"])
    assert described["base"] == "owner/sd" and described["settings"]["source"] == {"video": "me.mp4"}

    sd = exported_base(exported)
    usual = ["--prompt", "a cat", "--steps", "1", "--base", str(sd)]
    assert cli.main(["edit", "owner/skiing", *usual, "--out", "there.gif"]) == 0
    assert cli.main(["edit", str(tuned), *usual, "--out", "here.gif"]) == 0
    assert np.array_equal(video.read("there.gif").frames, video.read("here.gif").frames)
    assert video.settings_of("there.gif")["clip"] == "owner/skiing"
    assert {name for name in hub.fetched if "." in name} == set(FILES), "pictures are for the card"

    shutil.copytree(exported.repository, "repository")
    assert cli.main(["export", "owner/skiing", "--repository", "repository", "--base", str(sd)]) == 0
    assert "clips/skiing" in capsys.readouterr().out
    hub.fetched.clear()
    assert ClipFolder.at("owner/skiing").info.prompt == "a man | is <b>skiing</b>" and not hub.fetched


def exported_base(exported: Exported) -> Path:
    return Path(ClipFolder.at(exported.checkpoint).info.base)


def test_the_card_is_one_to_the_hub_and_shows_what_was_tuned(hub, tuned):
    sharing.push(tuned, "owner/skiing", sharing.CardConfig(base="owner/sd", license="mit"))
    card = ModelCard(hub.pushed[0]["README.md"].decode())
    assert card.data.base_model == "owner/sd" and card.data.license == "mit" and card.data.library_name == "tav-opt"
    assert "tune-a-video" in card.data.tags
    for part in (
        "tav-opt edit owner/skiing",
        "![](preview.png)",
        r"a man \| is &lt;b>skiing&lt;/b>",
        "4 frames of 64×64",
    ):
        assert part in card.text, part
    assert "| steps | 500 |" in card.text and "licence of the base model holds" in card.text


def test_a_base_that_is_a_folder_is_named_without_the_folders_above_it(hub, tuned, exported):
    sharing.push(tuned, "owner/skiing")
    described = json.loads(hub.pushed[0]["checkpoint.json"])
    assert described["base"] == exported_base(exported).name == "sd"
    card = hub.pushed[0]["README.md"].decode()
    assert "--base DIRECTORY" in card and "base_model" not in card
    sharing.push(tuned, "owner/skiing")
    assert len(hub.pushed) == 2, "a further push is another commit of the same repository"


def test_of_what_was_added_and_of_relative_paths_names_are_left(hub, tuned, capsys):
    """Paths in the description that tuning on LoRAs leaves, and a video that was named from the folder above."""
    description = read_json(tuned / "checkpoint.json")
    description["additions"] = {
        "loras": ["/home/someone/style.safetensors:0.5"], "embeddings": ["/home/someone/cat.pt:<my cat>"],
        "vae": "/home/someone/vae",
    }  # fmt: skip
    description |= {"inversion_iterations": 3, "base": "~/someone/sd"}
    description["settings"]["source"] = {"video": "../someone/private/me.mp4"}
    (tuned / "checkpoint.json").write_text(json.dumps(description))
    sharing.push(tuned, "owner/skiing")
    files = hub.pushed[0]
    assert not any(b"someone" in content for content in files.values())
    pushed = json.loads(files["checkpoint.json"])
    assert pushed["settings"]["source"] == {"video": "me.mp4"} and pushed["base"] == "sd"
    assert pushed["additions"] == {
        "loras": ["style.safetensors:0.5"], "embeddings": ["cat.pt:<my cat>"], "vae": "vae",
    }  # fmt: skip
    card = files["README.md"].decode()
    added = "--lora style.safetensors:0.5 --embedding 'cat.pt:<my cat>' --vae vae --base DIRECTORY"
    assert f"--out edit.mp4 {added}" in card and f"tav-opt export owner/skiing {added}" in card
    assert "| its loras | style.safetensors:0.5 |" in card and "of 3 iterations each" in card
    facts, words = told(capsys, tuned)
    assert facts["additions"] == description["additions"] and facts["inversion_iterations"] == 3
    assert "style.safetensors:0.5" in words


def test_a_picture_that_is_given_goes_before_the_runs_own_of_its_name(hub, tuned, tmp_path):
    (tmp_path / "mine").mkdir()
    video.write_png(tmp_path / "mine" / "preview.png", FRAMES[1])
    sharing.push(tuned, "owner/skiing", sharing.CardConfig(pictures=(tmp_path / "mine" / "preview.png",)))
    assert hub.pushed[0]["preview.png"] == (tmp_path / "mine" / "preview.png").read_bytes()
    assert hub.pushed[0]["README.md"].decode().count("![](preview.png)") == 1


def test_what_is_in_the_cache_serves_without_the_hub(hub, tuned, monkeypatch):
    sharing.push(tuned, "owner/skiing")
    ClipFolder.at("owner/skiing")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint.load("owner/skiing").info.frames == 4
    (ClipFolder.at("owner/skiing").path / "latents.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks latents\.safetensors.*in the cache; the hub does not answer"):
        ClipFolder.at("owner/skiing")
    with pytest.raises(InputError, match=r"clip 'owner/other' is no directory, and the hub does not give it"):
        ClipFolder.at("owner/other")


# What is refused, and leaves nothing on the hub.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["ckpt", "name"], "hub id 'name' is not owner/name"),
        (["ckpt", "owner/na me"], "hub id 'owner/na me' is not owner/name"),
        (["ckpt", "a/b/c"], "hub id 'a/b/c' is not owner/name"),
        (["ckpt", "owner/x", "--base", "/models/sd"], "base '/models/sd' is not owner/name"),
        (["nowhere", "owner/x"], "nowhere is not a checkpoint"),
        (["ckpt", "owner/x", "--picture", "absent.png"], "absent.png does not exist"),
        (["ckpt", "owner/x", "--picture", "ckpt/checkpoint.json"], "checkpoint.json cannot be shown"),
        (["ckpt", "owner/x", "--picture", "ckpt/loss.png", "--picture", "other/loss.png"], "two pictures are named"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(hub, tuned, capsys, options, words):
    Path("other").mkdir()
    shutil.copy("ckpt/loss.png", "other")
    assert cli.main(["push", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not hub.pushed and not (hub.root / "x").exists()


def test_an_altered_checkpoint_is_not_pushed(hub, tuned):
    values = tuned / "values.safetensors"
    values.write_bytes(values.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"values\.safetensors is missing or altered"):
        sharing.push(tuned, "owner/skiing")
    assert not hub.pushed


@pytest.mark.parametrize(("status", "words"), [(401, "hf auth login"), (403, "hf auth login"), (500, "500")])
def test_a_hub_that_refuses_is_quoted(hub, tuned, capsys, status, words):
    hub.refuses = status
    assert cli.main(["push", str(tuned), "owner/skiing"]) == 2
    error = capsys.readouterr().err
    assert "owner/skiing was not pushed" in error and words in error and error.count("\n") == 1


def test_no_hub_at_all_is_one_line(hub, tuned, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["push", str(tuned), "owner/skiing"]) == 2
    error = capsys.readouterr().err
    assert "owner/skiing was not pushed" in error and error.count("\n") == 1


def test_a_repository_that_is_no_clip_is_told_from_one(hub, tuned, capsys):
    (hub.root / "empty").mkdir()
    with pytest.raises(InputError, match=r"owner/empty is no tuned clip on the hub: it has no checkpoint\.json"):
        ClipFolder.at("owner/empty")
    sharing.push(tuned, "owner/skiing", sharing.CardConfig(base="owner/sd"))
    with pytest.raises(
        InputError, match="'owner/skiing' is a tuned clip, not a base model: it was tuned on 'owner/sd'"
    ):
        load("owner/skiing")
    (hub.root / "skiing" / "latents.safetensors").unlink()
    with pytest.raises(InputError, match=r"owner/skiing lacks latents\.safetensors, which its checkpoint\.json names"):
        ClipFolder.at("owner/skiing")


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a/b", "a/b"), ("a", None), ("a/b/c", None), ("/a/b", None), ("../b", None), ("./b", None), ("here/gone", None)],
)
def test_what_may_be_a_hub_id(path, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert hub_id_of(path) == expected


# Told of what is here.


def told(capsys: pytest.CaptureFixture[str], path: Path) -> tuple[dict, str]:
    """As JSON, and in words."""
    assert cli.main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert cli.main(["info", str(path)]) == 0
    return facts, capsys.readouterr().out


def test_a_checkpoint_is_told_with_its_memory(tuned, exported, capsys):
    facts, words = told(capsys, tuned)
    tensors = checkpoint.load(tuned).values
    assert facts["kind"] == "checkpoint" and facts["caption"] == "a man | is <b>skiing</b>"
    assert facts["tuned_values"] == {
        "tensors": len(tensors), "values": sum(x.numel() for x in tensors.values()), "dtype": "F16",
    }  # fmt: skip
    assert facts["tuned_with"]["lr"] == 3e-5 and (facts["frames"], facts["width"]) == (4, 64)
    assert facts["bytes"] == sum((tuned / name).stat().st_size for name in FILES)
    sd = load(exported_base(exported))
    assert facts["memory_bytes"]["float32"] == eager.estimate_editing(sd, 4, 64, 64)
    assert facts["memory_bytes"]["float16"] < facts["memory_bytes"]["float32"]
    assert "caption" in words and "MB" in words and "float16" in words


def test_an_outline_counts_as_the_model_does(exported):
    sd = load(exported_base(exported))
    found = outline.of(sd.base)
    assert found.unet.state_dict().keys() == sd.unet.state_dict().keys()
    assert {p.device.type for p in found.unet.parameters()} == {"meta"}


def test_an_exported_clip_and_its_repository(exported, capsys):
    facts, words = told(capsys, exported.version / "clips" / "first")
    assert facts["kind"] == "exported clip" and facts["name"] == "first" and "tuned_with" not in facts
    memory = facts["memory_bytes"]
    assert memory["loaded"] > 2 * (exported.base / "unet.onnx.data").stat().st_size and memory["added by an edit"] > 0
    facts, words = told(capsys, exported.repository)
    assert facts["kind"] == "model repository" and facts["clips"]["first"]["frames"] == 4
    assert facts["clips"]["first"]["exported_base"] == exported.base.name in facts["bases"]
    assert facts["bases"][exported.base.name]["made_by"]["torch"] and "first" in words


@pytest.mark.parametrize("name", ["e.mp4", "e.gif", "e", "one.png"])
def test_an_edit_is_told_from_its_file(tmp_path, capsys, name):
    made = {"software": "tav-opt 0.0", "clip": "first", "seed": 7, "prompts": ["ein Löwe 🦁"]}
    if name == "one.png":
        video.write_png(tmp_path / name, FRAMES[0], made)
    else:
        video.write(tmp_path / name, FRAMES, 8, made)
    facts, words = told(capsys, tmp_path / name)
    assert facts["kind"] == "edit" and facts["settings"] == made and "ein Löwe 🦁" in words
    assert facts.get("frames") == (None if name == "one.png" else 3)
    assert facts["height"] == facts["width"] == 64 and facts["bytes"] > 100


def test_settings_of_strangers_are_shown_whatever_they_are(tmp_path, capsys):
    made = {"software": "tav-opt 0.0", "x_bytes": "a", "bytes_": 1, "y_bytes": [1], "z_bytes": 10**400, "n_bytes": None}
    video.write_png(tmp_path / "e.png", FRAMES[0], made | {"of_bytes": {"one": True, "two": 2e6}})
    facts, words = told(capsys, tmp_path / "e.png")
    assert facts["settings"]["x_bytes"] == "a" and "2.0 MB" in words and "True" in words


def test_what_is_not_ours_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video.write("plain.mp4", FRAMES, 8)
    video.write("theirs.gif", FRAMES, 8, {"software": "another", "seed": 1})
    Path("text.mp4").write_text("no video")
    Image.fromarray(FRAMES[0]).save("photo.jpg")
    Path("empty").mkdir()
    (Path("begun") / "x").mkdir(parents=True)
    (Path("begun") / "resume.safetensors").touch()
    for path, words in (
        ("plain.mp4", "plain.mp4 does not say how it was made"),
        ("theirs.gif", "theirs.gif does not say how it was made"),
        ("text.mp4", "text.mp4 is no MP4, GIF or PNG"),
        ("photo.jpg", "photo.jpg is no MP4, GIF or PNG"),
        ("empty", "empty is no checkpoint, exported clip or model repository"),
        ("begun", "begun is half-written: tuning did not finish"),
        ("nowhere", "nowhere is not a checkpoint"),
    ):
        assert cli.main(["info", path]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_a_description_that_lies_is_one_line(tuned, capsys):
    description = read_json(tuned / "checkpoint.json")
    (tuned / "checkpoint.json").write_text(json.dumps({**description, "frames": "many"}))
    assert cli.main(["info", str(tuned)]) == 2
    assert "frames" in capsys.readouterr().err


def test_facts_are_json(exported):
    assert json.loads(json.dumps(about.about(exported.checkpoint)))["kind"] == "checkpoint"
