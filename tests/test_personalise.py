"""DreamBooth: the steps against a loop of their own, what is written against diffusers, and runs that are stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import owned
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tav_opt import checkpoint, cli, models, tuning_state
from tav_opt.base.directory import Base
from tav_opt.base.image_model import ImageModel
from tav_opt.command import Interrupted
from tav_opt.config import BaseConfig, InputError, PersonaliseConfig
from tav_opt.ddim import Schedule
from tav_opt.files import read_object, write_json
from tav_opt.personalise import dreambooth, pictures
from tav_opt.tuning_step import seeded_draw

QUICK = PersonaliseConfig(steps=3, lr=1e-3, batch=2, class_images=3, draw_steps=2, save_every=50, prior_weight=0.7)
ALONE = PersonaliseConfig(steps=3, lr=1e-3, batch=2)
"""Without a class."""
PROMPT, CLASS = "a sks panda", "a panda"


@pytest.fixture(scope="module")
def sd(golden: Path) -> Path:
    return golden / "reference_checkpoint" / "sd"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several sizes, as people have them."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (70 + 10 * number, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def run(sd: Path, images: Path, out: Path, config: PersonaliseConfig = QUICK, **given: object) -> Path:
    return dreambooth.personalise(sd, images, PROMPT, config, out, **{"class_prompt": CLASS, "device": "cpu"} | given)


@pytest.fixture(scope="module")
def learned(sd, images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(QUICK, preview_every=2, preview_prompts=(PROMPT, CLASS), keep_state=True)
    return run(sd, images, tmp_path_factory.mktemp("learned") / "out", config)


def by_hand(sd: Path, images: Path, drawn: np.ndarray) -> dict[str, Tensor]:
    """The UNet after QUICK by diffusers' own noise and PyTorch's own optimiser."""
    theirs = owned.pipeline(sd)
    for part in (theirs.unet, theirs.vae):  # sums in another order would be other steps, where gradients are near zero
        part.to(memory_format=torch.channels_last)
    noising = DDPMScheduler.from_config(theirs.scheduler.config)
    prompts = theirs.tokenizer([PROMPT, CLASS], padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        text = theirs.text_encoder(prompts)[0]
        latents = []
        for kind in (pictures.read(images, 64), drawn):
            pixels = torch.from_numpy(kind).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents.append(theirs.vae.encode(pixels).latent_dist.mean * theirs.vae.config.scaling_factor)
    optimizer = torch.optim.AdamW(theirs.unet.parameters(), lr=QUICK.lr, weight_decay=QUICK.weight_decay)
    for step in range(QUICK.steps):
        losses = []
        for kind in range(2):
            chosen = latents[kind][[(2 * step + offset) % len(latents[kind]) for offset in range(2)]]
            noise, t = seeded_draw(QUICK.seed + kind, chosen, _schedule(sd))(step, 0)
            found = theirs.unet(noising.add_noise(chosen, noise, t), t, text[kind].expand(2, -1, -1)).sample
            losses.append(F.mse_loss(found, noise))
        (losses[0] + QUICK.prior_weight * losses[1]).backward()
        torch.nn.utils.clip_grad_norm_(theirs.unet.parameters(), QUICK.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return theirs.unet.state_dict()


def _schedule(sd: Path):
    return models.Schedule.from_config(Base.at(sd).configs["scheduler"])


def test_the_steps_are_those_of_a_loop_by_hand(learned, sd, images):
    drawn = np.stack([np.asarray(Image.open(file)) for file in sorted((learned / "class_images").glob("*.png"))])
    assert len(drawn) == 3
    expected, before = by_hand(sd, images, drawn), owned.pipeline(sd).unet.state_dict()
    found = StableDiffusionPipeline.from_pretrained(learned).unet.state_dict()
    moved = max((expected[name] - before[name]).abs().max() for name in expected)
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 2e-2 * moved


def test_the_class_s_pictures_are_diffusers_own(learned, sd):
    theirs = owned.pipeline(sd)
    noise = torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(QUICK.seed + 1000))[None, :, 0]
    image = theirs(
        CLASS, num_inference_steps=2, guidance_scale=7.5, latents=noise, height=64, width=64, output_type="np"
    ).images[0]
    found = np.asarray(Image.open(learned / "class_images" / "00001.png")).astype(int)
    assert abs(found - (image * 255).round()).max() <= 1


def test_what_is_written_is_a_model_that_is_tuned_and_read(learned, sd):
    loaded = models.load(learned)
    assert Base.at(learned).hash != Base.at(sd).hash and loaded.tokenizer("a panda") == models.load(sd).tokenizer(
        "a panda"
    )
    for name in ("loss.csv", "loss.png", "previews/step-00002.png", "personalised.json"):
        assert (learned / name).is_file(), name
    assert torch.equal(loaded.vae.decoder.conv_in.weight, models.load(sd).vae.decoder.conv_in.weight)


@pytest.fixture(scope="module")
def lora(sd, images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(QUICK, lr=1e-2, lora_rank=2, text_encoder=True)
    return run(sd, images, tmp_path_factory.mktemp("lora") / "out", config)


@torch.no_grad()
def test_a_lora_is_what_diffusers_reads(lora, sd):
    theirs = owned.pipeline(sd)
    theirs.load_lora_weights(lora)
    ours = ImageModel.load(Base.at(BaseConfig(model=str(sd), loras=(str(lora),))))
    plain = ImageModel.load(Base.at(sd))
    g = torch.Generator().manual_seed(0)
    given = (torch.randn(1, 4, 8, 8, generator=g), torch.tensor([500]), torch.randn(1, 16, 32, generator=g))
    ids = torch.randint(0, 500, (1, 16), generator=g)
    for part, inputs in (("unet", given), ("text_encoder", (ids,))):
        found, expected, before = (getattr(one, part)(*inputs)[0] for one in (ours, theirs, plain))
        assert (found - expected).abs().max() < 1e-5, part
        assert (found - before).abs().max() > 1e-3, "it has learned something"


def weights_of(folder: Path) -> dict[str, Tensor]:
    return ImageModel.load(Base.at(folder)).unet.state_dict()  # type: ignore[union-attr]


def stop(stage: str, step: int, *_: object) -> None:
    if (stage, step) == ("personalise", 1):  # told after its state was saved
        raise Interrupted(2)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(learned, sd, images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="keeps the state after step 1, from which the same command goes on"):
        run(sd, images, out, replace(QUICK, save_every=1), on_step=stop)
    assert tuning_state.saved_steps(out) == 1 and not (out / "personalised.json").exists()
    drawn = [(file.name, file.stat().st_mtime_ns) for file in sorted((out / "class_images").iterdir())]
    with pytest.raises(InputError, match="holds the state of a run with prior_weight"):
        run(sd, images, out, replace(QUICK, prior_weight=0.5))
    run(sd, images, out)
    assert drawn == [(file.name, file.stat().st_mtime_ns) for file in sorted((out / "class_images").iterdir())]
    expected, found = weights_of(learned), weights_of(out)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    with pytest.raises(InputError, match="holds a personalised model: choose another --out"):
        run(sd, images, out)
    assert not (out / tuning_state.STATE).exists()


def tensors(folder: Path) -> dict[str, Tensor]:
    """Of all files of weights."""
    return {
        f"{file.relative_to(folder)} {name}": value
        for file in folder.rglob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.full), torch.bfloat16])
def test_in_every_precision_a_stopped_run_goes_on_to_the_same_float32(dtype, rank, sd, images, tmp_path):
    config = replace(ALONE, lr=1e-4, steps=2, lora_rank=rank, text_encoder=True, save_every=1)
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(sd, images, whole, config, class_prompt=None, dtype=dtype)
    with pytest.raises(Interrupted):
        run(sd, images, out, config, class_prompt=None, dtype=dtype, on_step=stop)
    run(sd, images, out, config, class_prompt=None, dtype=dtype)
    expected, found = tensors(whole), tensors(out)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], value) for name, value in expected.items())
    assert {value.dtype for value in found.values()} == {torch.float32}
    exact = [value for value in found.values() if not torch.equal(value, value.bfloat16().float())]
    assert len(exact) > 0.5 * len(found), "masters, and what did not train, are no halves"


def test_what_learns_nothing_in_half_precision_is_the_base_itself(sd, images, tmp_path):
    """Its schedule too, which diffusers' scheduler would have changed."""
    base = shutil.copytree(sd, tmp_path / "base", copy_function=shutil.copyfile)
    settings = read_object(base / "scheduler" / "scheduler_config.json") | {"steps_offset": 0}
    write_json(base / "scheduler" / "scheduler_config.json", settings)
    config = replace(ALONE, steps=1, lr=0.0, text_encoder=True)
    out = run(base, images, tmp_path / "out", config, class_prompt=None, dtype=torch.bfloat16)
    found, expected = (ImageModel.load(Base.at(folder)) for folder in (out, base))
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(expected, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in getattr(found, part).state_dict().items()), part
    assert _schedule(out) == _schedule(base) != _schedule(sd)
    assert StableDiffusionPipeline.from_pretrained(out).unet is not None


def test_pictures_of_a_class_are_taken_only_where_they_were_drawn_so(learned, sd, images, tmp_path):
    out = tmp_path / "out"
    drawn = shutil.copytree(learned / "class_images", out / "class_images")
    before = {file.name: file.read_bytes() for file in drawn.iterdir()}
    for other, name in (
        ({"config": replace(QUICK, seed=1)}, "seed 33, not 1"),
        ({"config": replace(QUICK, draw_steps=3)}, "draw_steps 2, not 3"),
        ({"class_prompt": "a dog"}, "class_prompt 'a panda', not 'a dog'"),
    ):
        with pytest.raises(InputError, match=f"holds pictures drawn with {name}: move the folder"):
            run(sd, images, out, **other)
    run(sd, images, out, replace(QUICK, class_images=2, steps=1))
    assert {file.name: file.read_bytes() for file in drawn.iterdir()} == before
    other = shutil.copytree(drawn, tmp_path / "other" / "class_images")
    (other / pictures.DRAWN).unlink()
    with pytest.raises(InputError, match=r"of which no drawn\.json tells"):
        run(sd, images, other.parent)


def test_of_several_class_prompts_each_is_drawn_and_learned_in_its_turn(sd, images, tmp_path, monkeypatch):
    several = ("a panda", "a dog", "a cat")
    told: list[Tensor] = []
    right = dreambooth.denoising_loss

    def seen(predict, chosen, text, *rest):
        told.append(text)
        return right(predict, chosen, text, *rest)

    monkeypatch.setattr(dreambooth, "denoising_loss", seen)
    config = replace(QUICK, class_images=4, batch=2, steps=2)
    out = run(sd, images, tmp_path / "out", config, class_prompt=several)
    drawn = [np.asarray(Image.open(out / "class_images" / f"{number:05}.png")) for number in range(4)]
    for number, prompt in ((1, "a dog"), (3, "a panda")):
        image = ImageModel.load(Base.at(sd))
        schedule = Schedule.from_config(Base.at(sd).configs["scheduler"])
        side = drawn[0].shape[0] // Base.at(sd).vae_factor
        (alone,) = pictures.draw(image, schedule, [prompt], side, config, numbers=[number])
        assert abs(alone.astype(int) - drawn[number]).max() <= 1
    image = ImageModel.load(Base.at(sd))
    with torch.no_grad():
        text = pictures.embed(image, (PROMPT, *several)).float()
    rows = [
        [0, 0],
        [1, 2],
        [0, 0],
        [3, 1],
    ]  # of the subject and of the class, whose fourth picture is the first prompt's
    assert all(torch.equal(found, text[row]) for found, row in zip(told, rows, strict=True))
    assert read_object(out / "class_images" / pictures.DRAWN)["class_prompt"] == list(several)
    with pytest.raises(InputError, match="class images 2 are fewer than the 3 class prompts"):
        run(sd, images, tmp_path / "b", replace(config, class_images=2), class_prompt=several)
    with pytest.raises(InputError, match="class prompt 'a dog' is given twice"):
        run(sd, images, tmp_path / "b", config, class_prompt=("a dog", "a dog"))


def test_a_state_s_settings_are_compared_before_anything_is_drawn(sd, images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(sd, images, out, replace(QUICK, save_every=1), on_step=stop)
    picture = out / "class_images" / "00000.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    with pytest.raises(InputError, match="holds the state of a run with class_pictures"):
        run(sd, images, out)
    picture.unlink()
    monkeypatch.setattr(pictures, "draw", None)
    with pytest.raises(InputError, match=r"holds the state of a run with lr 0\.001, not 0\.1"):
        run(sd, images, out, replace(QUICK, lr=0.1))


def test_without_peft_it_says_so_first(sd, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"lora rank 2 needs peft: pip install 'tav-opt\[lora\]'"):
        run(sd, tmp_path / "nowhere", tmp_path / "out", replace(QUICK, lora_rank=2))


def test_a_finished_run_goes_on_to_more_steps(learned, sd, images, tmp_path):
    out = shutil.copytree(learned, tmp_path / "out")
    before = weights_of(out)["conv_in.weight"]
    run(sd, images, out, replace(QUICK, steps=4))
    assert not torch.equal(before, weights_of(out)["conv_in.weight"])


def test_from_the_command_line_to_a_tuned_clip(lora, sd, images, tmp_path, capsys):
    out = tmp_path / "personal"
    options = f"personalise --model {sd} --images {images} --out {out} --steps 1 --lora-rank 1 --device cpu "
    options += "--gradient-checkpointing auto"
    assert cli.main([*options.split(), "--prompt", PROMPT]) == 0
    assert f"LoRA: {out}" in capsys.readouterr().out
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(2):
        shutil.copy(images / f"{number}.png", folder)
    tune = f"tune --model {sd} --lora {out}:0.5 --video {folder} --stride 1 --frames 2 --height 64 --width 64 --steps 1"
    rest = f"--inversion-steps 2 --out {tmp_path}/ckpt --device cpu"
    assert cli.main([*tune.split(), *rest.split(), "--prompt", PROMPT]) == 0
    assert checkpoint.load(tmp_path / "ckpt").info.additions == {
        "loras": [f"{out / 'pytorch_lora_weights.safetensors'}:0.5"]
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ("--images nowhere", "images nowhere is no folder"),
        ("--class-prompt PROMPT", "should be the prompt without the word of its own"),
        ("--warmup 9", "warmup 9 is more than the 3 steps"),
        ("--batch 0", "batch 0 is not within 1…64"),
        ("--lora-rank 2000", "lora rank 2000 is not within 0…1024"),
        ("--preview-every 2", "preview_every 2 needs preview_prompts"),
        ("--draw-steps 1001", "draw steps 1001 is not within"),
        ("--draw-steps 9", "draw steps 9 has no effect: it needs a class prompt or preview_every"),
        ("--draw-guidance 2", "draw guidance 2.0 has no effect"),
        ("--class-images 9", "class images 9 has no effect: it needs a class prompt"),
        ("--prior-weight 0.5", "prior weight 0.5 has no effect: it needs a class prompt"),
        ("--model MODEL/unet", "one part alone"),
    ],
)
def test_what_cannot_be_followed_is_said_in_one_line(options, message, sd, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [
        "personalise",
        "--model",
        str(sd),
        "--images",
        str(images),
        "--prompt",
        PROMPT,
        "--steps",
        "3",
        "--out",
        "x",
    ]
    words = [word.replace("PROMPT", PROMPT).replace("MODEL", str(sd)) for word in options.split()]
    status = cli.main([*command, *words, "--device", "cpu"])
    error = capsys.readouterr().err
    assert status == 2 and message in error.splitlines()[-1] and not Path("x").exists(), error


def test_pictures_that_are_none(sd, tmp_path):
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(InputError, match=r"a\.png"):
        run(sd, tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="was tuned on a clip by the reference"):
        run(sd.with_name("tuned"), _one(tmp_path / "one"), tmp_path / "out")


def _one(folder: Path) -> Path:
    folder.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "a.png")
    return folder
