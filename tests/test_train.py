"""Training of the demo's models on generated data: it runs, resumes to the step, learns, and what it writes loads."""

from __future__ import annotations

import shutil
import tarfile
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel

from tav_opt import models
from tav_opt.config import InputError
from tav_opt.demo import subjects, training, world
from tav_opt.demo.emoji import FURTHER, JUDGED
from tav_opt.demo.sizes import LARGE
from tav_opt.demo.text import TOKENS, WIDTH, new_tokenizer, text_config
from tav_opt.demo.text2image import new_unet
from tav_opt.demo.train import publish, train
from tav_opt.demo.training import Run
from tav_opt.demo.vae import new_vae, psnr
from tav_opt.files import read_json, write_json


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage did a step or more on generated shapes."""
    folder = tmp_path_factory.mktemp("train")
    for stage in ("vae", "text2image", "dual-encoder", "locator", "control"):
        train(stage=stage, minutes=0.01, folder=folder, smoke=True, threads=1)
    return folder / "smoke"


def test_the_model_is_a_stable_diffusion_directory(trained: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "model")
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red square", num_inference_steps=2, output_type="np", generator=torch.Generator()).images[0]
    assert picture.shape == (64, 64, 3)
    files = list((trained / "model").rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"unet", "vae", "text_encoder"}


def test_the_video_model_reads_it(trained: Path) -> None:
    sd = models.load(trained / "model")
    assert sd.vae_factor == 4
    frames = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), np.uint8)
    latents = models.encode_video(sd, frames)
    assert latents.shape == (1, sd.vae.config.latent_channels, 2, 16, 16)
    with torch.no_grad():
        found = sd.unet(latents, torch.tensor([5]), models.encode_prompt(sd, ["a red square"]))
    assert found.shape == latents.shape and found.isfinite().all()


def test_the_scaling_factor_makes_latents_of_unit_size(trained: Path) -> None:
    sd = models.load(trained / "model")
    rng = np.random.default_rng(0)
    sprites = subjects.shapes()
    scenes = [world.draw_scene(rng, list(sprites)) for _ in range(32)]
    latents = models.encode_video(sd, np.stack([world.compose(scene, sprites, rng) for scene in scenes]))
    assert 0.7 < float(latents.std()) < 1.4


def test_the_dual_encoder_is_a_clip_directory(trained: Path) -> None:
    clip = CLIPModel.from_pretrained(trained / "clip_model")
    processor = CLIPProcessor.from_pretrained(trained / "clip_model")
    assert clip.dtype == torch.float32
    image = np.zeros((64, 64, 3), np.uint8)
    batch = processor(text=["a red square", "a blue circle"], images=[image], return_tensors="pt", padding="max_length")
    with torch.no_grad():
        assert clip(**batch).logits_per_image.shape == (1, 2)


def test_the_record_says_how_it_was_trained(trained: Path) -> None:
    record = read_json(trained / "training.json")
    assert record["data"]["stills"].endswith("@1.1.0")
    for stage in ("vae", "text2image", "dual-encoder", "locator", "control"):
        assert record[stage]["steps"] >= 1 and record[stage]["hours"] >= 0, stage
    assert record["vae"]["psnr_db"] > 0


def test_text2image_needs_the_vae_that_it_learned_on(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train --stage vae first"):
        train(stage="text2image", minutes=0, folder=tmp_path, smoke=True, threads=1)
    train(stage="vae", minutes=0.01, folder=trained.parent, smoke=True, threads=1)
    with pytest.raises(InputError, match="the VAE changed"):
        train(stage="text2image", minutes=0, folder=trained.parent, smoke=True, threads=1)


class Line:
    """Fits y = 3x + 1: a stage whose answer is known."""

    name = "line"
    lr = 0.05

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.line = nn.Linear(1, 1)
        self.modules = nn.ModuleDict({"line": self.line})

    def loss(self, rng: np.random.Generator) -> Tensor:
        x = torch.from_numpy(rng.random((16, 1))).float() + 0.01 * torch.randn(16, 1)
        return (self.line(x) - 3 * x - 1).square().mean()

    def sheet(self) -> np.ndarray:
        return np.zeros((4, 4, 3), np.uint8)


def test_a_run_that_was_broken_off_ends_as_one_that_was_not(tmp_path: Path) -> None:
    through = Run(Line(), tmp_path / "a", 1)
    through.train(minutes=1, steps=30)
    Run(Line(), tmp_path / "b", 1).train(minutes=1, steps=13)
    resumed = Run(Line(), tmp_path / "b", 1)
    assert resumed.progress.step == 13
    resumed.train(minutes=1, steps=30)
    for whole, broken in zip(
        [*through.parameters, *through.averages], [*resumed.parameters, *resumed.averages], strict=True
    ):
        torch.testing.assert_close(whole, broken, rtol=0, atol=0)
    assert through.progress.loss == resumed.progress.loss


def test_the_learning_rate_cools_down_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()  # a millisecond each time that somebody looks, however busy the machine is
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock) / 1000))
    hot, cold = Run(Line(), tmp_path / "hot", 1), Run(Line(), tmp_path / "cold", 1)
    hot.train(minutes=0.01)
    cold.train(minutes=0.01, cool_down=True)
    assert cold.optimizer.param_groups[0]["lr"] < 0.1 * Line.lr == 0.1 * hot.optimizer.param_groups[0]["lr"]


def test_two_runs_of_a_stage_do_not_undo_each_other(tmp_path: Path) -> None:
    class Inner(Line):
        def loss(self, rng: np.random.Generator) -> Tensor:
            with pytest.raises(InputError, match="another process trains line"):
                Run(Line(), tmp_path, 1).train(minutes=1, steps=1)
            return super().loss(rng)

    assert Run(Inner(), tmp_path, 1).train(minutes=1, steps=1).step == 1


def test_a_run_learns_and_its_average_follows(tmp_path: Path) -> None:
    stage = Line()
    run = Run(stage, tmp_path, 1)
    run.train(minutes=2, steps=1500)
    assert stage.line.weight.item() == pytest.approx(3, abs=0.1)
    raw = stage.line.weight.item()
    run.swap()
    assert stage.line.weight.item() == pytest.approx(3, abs=0.3)
    run.swap()
    assert stage.line.weight.item() == raw


def test_the_large_model_is_of_128_pixels_in_40_mb() -> None:
    with torch.device("meta"):
        vae, unet = new_vae(LARGE), new_unet(LARGE)
        text_encoder = CLIPTextModel(text_config(new_tokenizer([*JUDGED, *FURTHER])))
        pixels, text = torch.empty(1, 3, 128, 128), torch.empty(1, TOKENS, WIDTH)
    values = sum(p.numel() for part in (vae, unet, text_encoder) for p in part.parameters())
    assert 2 * values + 1e5 < 40e6, "in fp16, with the tokenizer beside"
    latents = vae.encode(pixels).latent_dist.mean
    assert latents.shape == (1, 16, 16, 16) and LARGE.factor == 8
    assert unet(latents, torch.zeros(1, device="meta"), text).sample.shape == latents.shape


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stage": "locator", "size": 128}, "stage locator with size 128, device auto: only vae and text2image"),
        ({"stage": "publish", "device": "cuda"}, "stage publish with size 64, device cuda: only vae and text2image"),
        ({"stage": "vae", "device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
)
def test_what_a_stage_does_not_have_is_refused(settings: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        train(**settings, folder=tmp_path / "new", smoke=True)
    assert not (tmp_path / "new").exists()


def test_weights_of_another_size_are_no_start(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "start" / "model").mkdir(parents=True)
    (tmp_path / "start" / "model" / "vae").symlink_to(trained / "vae")
    with pytest.raises(InputError, match="holds the weights of another network than this size's"):
        train(stage="vae", minutes=0, folder=tmp_path, start_from=tmp_path / "start", smoke=True, threads=1, size=128)


def test_psnr_of_a_known_error() -> None:
    truth = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(truth, truth + np.uint8(255 // 10)) == pytest.approx(20 * np.log10(255 / 25), abs=1e-6)


def test_a_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def pack(name: str, folder: Path) -> Path:
        fetched.append(name)
        (folder / "content").write_text("picture")
        with tarfile.open(folder / "p.tgz", "w:gz") as tar:
            tar.add(folder / "content", "package/assets/1f406.webp")
        return folder / "p.tgz"

    monkeypatch.setattr(subjects, "_npm_pack", pack)
    for _ in range(2):
        assert (subjects.package("@scope/name@1.0.0", tmp_path) / "assets" / "1f406.webp").read_text() == "picture"
    assert fetched == ["@scope/name@1.0.0"]


def test_npm_that_is_missing_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="npm is not installed") as caught:
        subjects.package("@scope/name@1.0.0", tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("npm/name*"))


def test_published_weights_are_a_start_and_lie_with_clips_licence_and_record(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def animation(code: str, cache: Path) -> tuple[list[Image.Image], float]:
        return subjects.shapes()["red circle"] * 6, 24.0

    monkeypatch.setattr(subjects, "animation", animation)
    publish(trained, tmp_path / "package")
    for part in ("model", "clip_model", "locator", "control", "clips"):
        assert "Microsoft" in (tmp_path / "package" / part / "LICENSE.fluent-emoji.txt").read_text()
    assert read_json(tmp_path / "package" / "model" / "training.json")["vae"]["steps"] >= 1
    for entry in read_json(tmp_path / "package" / "clips" / "clips.json"):
        with av.open(str(tmp_path / "package" / "clips" / entry["file"])) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == entry["frames"] and frames[0].shape == (64, 64, 3)
    for stage in ("vae", "text2image", "dual-encoder", "locator", "control"):
        train(stage=stage, minutes=0, folder=tmp_path, start_from=tmp_path / "package", smoke=True, threads=1)
    for name in ("model/vae", "model/unet", "model/text_encoder", "clip_model", "locator", "control"):
        begun, published = (next((folder / name).glob("*.safetensors")) for folder in (tmp_path / "smoke", trained))
        first, second = load_file(begun), load_file(published)
        assert all(torch.equal(first[key], second[key]) for key in second), name
    with pytest.raises(InputError, match="no weights to start from"):
        train(stage="vae", minutes=0, folder=tmp_path / "c", start_from=tmp_path / "none", smoke=True, threads=1)


def test_a_part_trained_later_is_published_beside_the_model_that_is_there(trained: Path, tmp_path: Path) -> None:
    folder, package = tmp_path / "later", tmp_path / "package"
    shutil.copytree(trained / "control", folder / "control")
    shutil.copy(trained / "training.json", folder / "training.json")
    with pytest.raises(InputError, match="train --stage text2image first"):
        publish(folder, package)
    write_json(package / "model" / "training.json", {"seed": 1, "vae": {"steps": 7}, "control": {"steps": 0}})
    write_json(folder / "training.json", {"seed": 2, "control": {"steps": 5}})
    publish(folder, package)
    record = read_json(package / "model" / "training.json")
    assert record == {"seed": 1, "vae": {"steps": 7}, "control": {"steps": 5}}
    assert {file.name for file in package.iterdir()} == {"model", "control"}
    assert "Microsoft" in (package / "control" / "LICENSE.fluent-emoji.txt").read_text()
