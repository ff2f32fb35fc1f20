"""Encoders from directories, embeddings beside the edit, and `tav-opt metrics` from two files to a table and JSON."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, ViTConfig, ViTModel

from tav_opt import cli, video
from tav_opt.config import ClipConfig, InputError, MetricsConfig
from tav_opt.metrics import clip_encoder, clip_scores
from tav_opt.metrics.clip_encoder import DEMO, DEMO_NAME, ClipEncoder
from tav_opt.metrics.embeddings import image_embeddings
from tav_opt.metrics.structure_distance import Vit
from tav_opt.video.masks import fitted_mask, read_mask

RANDOM = np.random.default_rng(2)
FRAMES = RANDOM.integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of random weights, with the demo's words."""
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    shutil.copytree(DEMO, folder)
    config = CLIPModel.config_class.from_pretrained(folder)
    for tower in (config.text_config, config.vision_config):
        tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers = 32, 64, 1
    config.projection_dim = config.text_config.projection_dim = config.vision_config.projection_dim = 16
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT of random weights, without a pooler, as DINO's are."""
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    processor = {"size": {"height": 32, "width": 32}, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


# Encoders.


def test_both_kinds_of_answers_give_the_towers_own_embeddings(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 answers with an object that has them, before that it was a tensor."""
    encoder = ClipEncoder.open(clip, batch=2)
    images, texts = encoder.embed_images(FRAMES), encoder.embed_texts(["a cat", "a dog at night"])
    pixels = encoder.processor(images=list(FRAMES), return_tensors="pt").pixel_values
    model = encoder.model
    with torch.no_grad():
        plain = model.visual_projection(model.vision_model(pixels).pooler_output)
    torch.testing.assert_close(images, plain / plain.norm(dim=1, keepdim=True))
    for name in ("get_image_features", "get_text_features"):
        asked = getattr(model, name)
        monkeypatch.setattr(model, name, lambda asked=asked, **given: asked(**given).pooler_output)
    assert torch.equal(encoder.embed_images(FRAMES), images)
    assert torch.equal(encoder.embed_texts(["a cat", "a dog at night"]), texts)
    assert (images.shape, texts.shape, str(clip)) == ((5, 16), (2, 16), encoder.name)


def test_a_directory_without_processor_has_clips_own(clip: Path, tmp_path: Path) -> None:
    shutil.copytree(clip, tmp_path / "silent")
    (tmp_path / "silent" / "processor_config.json").unlink()
    processor = ClipEncoder.open(tmp_path / "silent").processor
    assert processor(images=[FRAMES[0]], return_tensors="pt").pixel_values.shape == (1, 3, 64, 64)
    assert processor.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_the_demos_encoder_is_named_as_such_and_knows_its_world() -> None:
    encoder = ClipEncoder.open(DEMO)
    assert encoder.name == DEMO_NAME and "not CLIP" in DEMO_NAME
    frames = video.read(DEMO.parent / "clips" / "leopard.mp4", count=4, uniform=True).frames
    images = encoder.embed_images(frames)
    leopard, zebra = encoder.embed_texts(["a leopard on the beach", "a zebra in the snow"])
    assert clip_scores.textual_alignment(images, leopard) > clip_scores.textual_alignment(images, zebra) + 5
    assert clip_scores.frame_accuracy(images, leopard, zebra) == 1


def test_without_openais_clip_the_demos_encoder_measures_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(_place: object, *, network: bool) -> Path:
        assert network
        raise InputError("model 'openai/clip-vit-large-patch14' is not to be had")

    held = clip_encoder.resolve
    monkeypatch.setattr(
        clip_encoder, "resolve", lambda at, network: (held if Path(at) == DEMO else absent)(at, network=True)
    )
    with caplog.at_level(logging.WARNING):
        assert clip_encoder.open_encoder(MetricsConfig()).name == DEMO_NAME
    assert "openai/clip-vit-large-patch14" in caplog.text and "not CLIP" in caplog.text
    with pytest.raises(InputError, match="not to be had"):
        clip_encoder.open_encoder(MetricsConfig(clip="openai/clip-vit-large-patch14"))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda at: (at / "config.json").unlink(), "config.json does not exist"),
        (lambda at: (at / "config.json").write_text('{"model_type": "bert"}'), "is no CLIP.*'bert'"),
        (lambda at: (at / "model.safetensors").unlink(), "holds no weights"),
        (lambda at: (at / "model.safetensors").write_bytes(b"x" * 99), "cannot be loaded"),
        (lambda at: (at / "tokenizer.json").write_text("{"), "no tokenizer that can be read"),
    ],
)
def test_what_is_no_clip_is_refused(clip: Path, tmp_path: Path, harm, words: str) -> None:
    shutil.copytree(clip, tmp_path / "harmed")
    harm(tmp_path / "harmed")
    with pytest.raises(InputError, match=words) as caught:
        ClipEncoder.open(tmp_path / "harmed")
    assert "\n" not in str(caught.value)


def altered(clip: Path, folder: Path, name: str, change) -> Path:
    """A copy of an encoder with a tensor changed, or gone."""
    shutil.copytree(clip, folder)
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed}), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_lack_values_are_refused_not_drawn_at_random(clip: Path, tmp_path: Path) -> None:
    at = altered(clip, tmp_path / "less", "visual_projection.weight", lambda _: None)
    with pytest.raises(InputError, match=r"is no CLIPModel: its weights lack visual_projection\.weight, 1 in all"):
        ClipEncoder.open(at)


def test_long_prompts_are_refused(clip: Path) -> None:
    with pytest.raises(InputError, match="tokens long, 24 at most"):
        ClipEncoder.open(clip).embed_texts("a panda " * 20)


def test_what_is_no_vit_is_refused(vit: Path, clip: Path) -> None:
    assert Vit.open(vit).keys(FRAMES).shape == (5, 17, 32)
    with pytest.raises(InputError, match=r"is no ViT.*'clip'"):
        Vit.open(clip)


# Embeddings beside the edit.


def test_embeddings_are_kept_for_these_frames_and_this_encoder_alone(clip: Path, tmp_path: Path) -> None:
    encoder, edit = ClipEncoder.open(clip), tmp_path / "edit.mp4"
    asked: list[int] = []
    embed = ClipEncoder.embed_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipEncoder, "embed_images", lambda self, frames: (asked.append(1), embed(self, frames))[1])
        first = image_embeddings(encoder, FRAMES, edit)
        (file,) = tmp_path.iterdir()
        assert file.name == f"edit.mp4.{encoder.hash[:8]}.safetensors"
        assert torch.equal(image_embeddings(encoder, FRAMES, edit), first) and len(asked) == 1
        changed = FRAMES.copy()
        changed[4, 24, 32, 0] ^= 128
        assert not torch.equal(image_embeddings(encoder, changed, edit), first) and len(asked) == 2
        assert image_embeddings(encoder, FRAMES[:, ::-1], edit).shape == (5, 16) and len(asked) == 3
        other = ClipEncoder.open(altered(clip, tmp_path / "other", "visual_projection.weight", lambda w: -w))
        assert other.hash != encoder.hash
        assert torch.equal(image_embeddings(other, FRAMES, edit), -first) and len(asked) == 4
        file.write_bytes(file.read_bytes()[:-8])
        assert torch.equal(image_embeddings(encoder, FRAMES, edit), first) and len(asked) == 5, "cut short"
        assert torch.equal(image_embeddings(encoder, FRAMES, edit), first) and len(asked) == 5


def test_figures_come_where_nothing_can_be_kept(clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert image_embeddings(ClipEncoder.open(clip), FRAMES, tmp_path / "file" / "edit.mp4").shape == (5, 16)
    assert "embeddings are not kept" in caplog.text


# Masks.


def test_masks_of_every_kind(tmp_path: Path) -> None:
    shown = np.zeros((2, 16, 16), bool)
    shown[0, 4:8, 2:10], shown[1, 8:12, 2:10] = True, True
    white = np.where(shown[..., None], 255, 0).astype(np.uint8).repeat(3, -1)
    video.write(tmp_path / "mask.mp4", white, 8)
    video.write(tmp_path / "folder", white, 8)
    assert (read_mask(tmp_path / "mask.mp4") == shown).mean() > 0.97  # chroma's halves
    assert (read_mask(tmp_path / "folder") == shown).all()
    Image.fromarray(white[0]).save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png") == shown[:1]).all()
    palette = Image.fromarray(shown[0].astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0])  # DAVIS' first object
    palette.save(tmp_path / "davis.png")
    assert (read_mask(tmp_path / "davis.png") == shown[:1]).all()
    palette.putpalette([0, 0, 0, 64, 0, 0])  # a later object
    palette.save(tmp_path / "davis.png")
    assert (read_mask(tmp_path / "davis.png") == shown[:1]).all()
    (tmp_path / "text.png").write_text("no picture")
    for name, words in (("none.png", "none.png does not exist"), ("text.png", "text.png is not a whole image")):
        with pytest.raises(InputError, match=words):
            read_mask(tmp_path / name)


def test_dark_objects_keep_their_place_when_masks_are_fitted(tmp_path: Path) -> None:
    """DAVIS' palette has (64, 0, 0), (0, 64, 0), …; the middle half of twice the size is fitted to one."""
    shown = np.zeros((64, 128), np.uint8)
    shown[16:48, 40:64], shown[16:48, 64:80] = 1, 2
    (tmp_path / "masks").mkdir()
    for number in range(3):
        picture = Image.fromarray(shown, mode="P")
        picture.putpalette([0, 0, 0, 64, 0, 0, 0, 64, 0])
        picture.save(tmp_path / "masks" / f"{number}.png")
    clip = ClipConfig(video=tmp_path / "absent.mp4", frames=2, stride=2, height=32, width=32)
    mask = fitted_mask(tmp_path / "masks", clip)
    assert mask.shape == (2, 32, 32) and (mask == (shown > 0)[::2, 32:96:2]).mean() > 0.99
    with pytest.raises(InputError, match="frames from start 0, stride 2 need 5; it has 3"):
        fitted_mask(tmp_path / "masks", replace(clip, frames=3))


# The command.


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    try:
        status = cli.main(["metrics", *map(str, arguments)])
    except SystemExit as error:  # of tyro
        status = int(error.code or 0)
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit, its source, and a mask, all of 4 frames of 64×48."""
    folder = tmp_path_factory.mktemp("files")
    picture = np.asarray(Image.fromarray(RANDOM.integers(0, 256, (20, 24, 3), dtype=np.uint8)).resize((96, 80), 3))
    source = np.stack([picture[8:56, 2 * n : 64 + 2 * n] for n in range(4)])
    edit = source.copy()
    edit[:, 10:20, 10:30] = (255, 0, 0)
    video.write(folder / "source.mp4", source, 8)
    video.write(folder / "edit.mp4", edit, 8)
    mask = np.zeros((48, 64), np.uint8)
    mask[8:22, 8:32] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def test_the_command_end_to_end(capsys, files: Path, clip: Path, vit: Path, tmp_path: Path) -> None:
    edit, out = shutil.copy(files / "edit.mp4", tmp_path), tmp_path / "out" / "edit.json"
    asked = [edit, "--source", files / "source.mp4", "--prompt", "a red square", "--source-prompt", "a dog"]
    networks = ["--clip", clip, "--pick-score", clip, "--dino", vit, "--device", "cpu"]
    status, shown, error = run(capsys, *asked, *networks, "--mask", files / "mask.png", "--json", out)
    assert status == 0, error
    told = json.loads(out.read_text())
    assert told["networks"] == {"encoder": str(clip), "PickScore": str(clip), "DINO": str(vit)}
    assert set(told["left_out"]) == {"background LPIPS"} and "torchvision" in told["left_out"]["background LPIPS"]
    figures = told["metrics"]
    assert shown.splitlines()[-1] == str(out)
    for name, value in figures.items():
        assert f"{name:20}{value:.4g}" in shown.splitlines()
    encoder = ClipEncoder.open(clip)
    images = encoder.embed_images(video.read(edit).frames)
    text = encoder.embed_texts("a red square")[0]
    assert figures["frame consistency"] == pytest.approx(clip_scores.frame_consistency(images), abs=1e-6)
    assert figures["textual alignment"] == pytest.approx(clip_scores.textual_alignment(images, text), abs=1e-4)
    assert figures["PickScore"] == pytest.approx(figures["textual alignment"] * encoder.scale / 100, abs=1e-4)
    assert 0 < figures["warping error"] < 0.05 and 0.8 < figures["motion fidelity"] <= 1
    assert figures["background PSNR"] > 30 and 0.9 < figures["background SSIM"] <= 1
    assert figures["structure distance"] > 0 and figures["frame accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [f"edit.mp4.{encoder.hash[:8]}.safetensors"]


def test_what_is_not_given_is_left_out_and_said(capsys, files: Path, tmp_path: Path) -> None:
    edit = shutil.copy(files / "edit.mp4", tmp_path)
    status, shown, _ = run(capsys, edit, "--source", files / "source.mp4", "--prompt", "a red car", "--clip", DEMO)
    rows = dict(line.split("  ", 1) for line in shown.splitlines())
    assert status == 0 and rows["encoder"].strip() == DEMO_NAME
    for name, why in (
        ("frame accuracy", "no source prompt"),
        ("PickScore", "no PickScore network"),
        ("structure distance", "no DINO network"),
        ("background PSNR", "no mask"),
    ):
        assert rows[name].strip() == f"left out: {why} is given"


def test_every_wrong_input_is_one_line_before_any_network(capsys, files: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tav_opt.metrics.measuring.Networks.open", lambda _: pytest.fail("a network was opened"))
    video.write(tmp_path / "short.mp4", FRAMES[:3], 8)
    video.write(tmp_path / "large.mp4", FRAMES[:4].repeat(2, 1), 8)
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(tmp_path / "white.png")
    good = {"--source": files / "source.mp4", "--prompt": "a cat"}
    cases = [
        ("nowhere.mp4", {}, "nowhere.mp4 does not exist"),
        (files / "mask.png", {}, "mask.png is cut short"),
        (files / "edit.mp4", {"--source": "nowhere.mp4"}, "nowhere.mp4 does not exist"),
        (files / "edit.mp4", {"--source": tmp_path / "short.mp4"}, "edit of 4 frames of 64×48, source of 3 frames"),
        (files / "edit.mp4", {"--source": tmp_path / "large.mp4"}, "source of 4 frames of 64×96"),
        (files / "edit.mp4", {"--prompt": ""}, "prompt '' is empty"),
        (files / "edit.mp4", {"--source-prompt": " "}, "source prompt ' ' is empty"),
        (files / "edit.mp4", {"--mask": "no.png"}, "no.png does not exist"),
        (files / "edit.mp4", {"--mask": tmp_path / "short.mp4"}, "mask of 3 frames of 64×48, edit of 4 frames"),
        (files / "edit.mp4", {"--mask": tmp_path / "white.png"}, "no background"),
        (files / "edit.mp4", {"--batch": "0"}, "batch 0"),
        (files / "edit.mp4", {"--json": files / "edit.mp4" / "x.json"}, "x.json cannot be written"),
    ]
    for edit, change, words in cases:
        status, _, error = run(capsys, edit, *(word for option in (good | change).items() for word in option))
        assert status == 2 and error.count("\n") == 1 and words in error, error


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_named(capsys, files: Path, clip: Path, device: str) -> None:
    options = ["--source", files / "source.mp4", "--prompt", "a cat", "--clip", clip, "--device", device]
    status, _, error = run(capsys, files / "edit.mp4", *options)
    assert status == 2 and error.count("\n") == 1 and device in error


def test_nan_in_a_metric_is_an_error_not_a_figure(capsys, files: Path, clip: Path, vit: Path, tmp_path: Path) -> None:
    edit = shutil.copy(files / "edit.mp4", tmp_path)
    asked = [edit, "--source", files / "source.mp4", "--prompt", "a cat", "--json", tmp_path / "out.json"]
    broken = altered(clip, tmp_path / "nan", "visual_projection.weight", lambda w: w * float("nan"))
    status, _, error = run(capsys, *asked, "--clip", broken)
    assert status == 2 and error.count("\n") == 1 and "the embedding of a frame is NaN" in error
    name = next(name for name in load_file(vit / "model.safetensors") if name.endswith("layernorm_before.weight"))
    broken = altered(vit, tmp_path / "nan-vit", name, lambda w: w * float("nan"))
    status, _, error = run(capsys, *asked, "--clip", clip, "--dino", broken)
    assert status == 2 and error.count("\n") == 1 and "structure distance is nan" in error
    assert not (tmp_path / "out.json").exists()
