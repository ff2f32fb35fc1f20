"""The reference's YAML files are accepted as they are; ours too; mistakes in them are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tav_opt.config import ClipConfig, EditConfig, InputError, TrainConfig
from tav_opt.reference import RunConfig, read_reference_config

STRIDE = {"car-turn": 2, "man-skiing": 2, "man-surfing": 1, "rabbit-watermelon": 2}


@pytest.mark.parametrize("name", STRIDE)
def test_reference_file_as_it_is(shared: Path, name: str) -> None:
    path = shared / "reference_configs" / f"{name}.yaml"
    found = read_reference_config(path)
    prompts = tuple(yaml.safe_load(path.read_text())["validation_data"]["prompts"])
    assert len(prompts) == 4
    assert found == RunConfig(
        model="./checkpoints/stable-diffusion-v1-4",
        clip=ClipConfig(video=Path(f"data/{name}.mp4"), stride=STRIDE[name], fit="squash"),
        train=TrainConfig(
            gradient_checkpointing=True, autocast="fp16", preview_every=100, preview_prompts=prompts, lr=3e-5, steps=500
        ),
        prompt=yaml.safe_load(path.read_text())["train_data"]["prompt"],
        edit=EditConfig(prompts=prompts),
        out=Path(f"outputs/{name}"),
        edit_defaults={"steps": 50, "guidance_scale": 12.5, "inversion": True},
    )


def written(folder: Path, settings: Any) -> Path:
    path = folder / "settings.yaml"
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return path


REFERENCE = {
    "pretrained_model_path": "sd",
    "output_dir": "o",
    "train_data": {"video_path": "v.mp4", "prompt": "a dog"},
    "validation_data": {"prompts": ["a cat"], "video_length": 24},
}
OWN = {"model": "sd", "prompt": "a dog", "video": "v.mp4"}


def test_every_setting_of_the_reference_has_its_place(tmp_path: Path) -> None:
    more = {
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 5,
        "adam_beta2": 0.99,
        "adam_weight_decay": 0.1,
        "adam_epsilon": "1e-6",
        "max_grad_norm": 2,
        "gradient_accumulation_steps": 4,
        "mixed_precision": "no",
        "resume_from_checkpoint": None,
        "checkpointing_steps": 10,
    }
    train = read_reference_config(written(tmp_path, REFERENCE | more)).train
    assert (train.schedule, train.warmup, train.betas, train.weight_decay) == ("cosine", 5, (0.9, 0.99), 0.1)
    assert (train.eps, train.clip_norm, train.accumulation, train.autocast) == (1e-6, 2.0, 4, "no")


def test_our_own_file(tmp_path: Path) -> None:
    found = read_reference_config(
        written(tmp_path, OWN | {"frames": 8, "lr": "1e-4", "trainable": ["attn_temp"], "seed": 7, "betas": [0.8, 0.9]})
    )
    assert found.clip == ClipConfig(video=Path("v.mp4"), frames=8)
    assert found.train == TrainConfig(lr=1e-4, trainable=("attn_temp",), seed=7, betas=(0.8, 0.9))
    assert (found.model, found.prompt, found.out, found.edit) == ("sd", "a dog", Path("ckpt"), EditConfig(seed=7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (OWN | {"learning_rate": 1}, "unknown key learning_rate"),
        (REFERENCE | {"lr": 1}, "unknown key lr"),
        (REFERENCE | {"train_data": {"video_path": "v", "prompt": "p", "fps": 3}}, r"unknown key train_data\.fps"),
        (REFERENCE | {"train_data": {"prompt": "p"}}, r"key train_data\.video_path is missing"),
        ({"model": "sd", "prompt": "a dog"}, "key video is missing"),
        (REFERENCE | {"use_8bit_adam": True}, "use_8bit_adam: True is not supported"),
        (REFERENCE | {"train_batch_size": 2}, "train_batch_size: 2 is not supported"),
        (REFERENCE | {"mixed_precision": "fp8"}, "autocast: 'fp8' is not 'no', 'fp16', 'bf16'"),
        (
            REFERENCE | {"validation_data": {"video_length": 8}},
            r"validation_data\.video_length: 8 is not the clip's 24",
        ),
        (REFERENCE | {"train_data": 3}, "train_data: 3 is not dict"),
        (OWN | {"steps": 1.5}, r"steps: 1\.5 is not int"),
        (OWN | {"steps": True}, "steps: True is not int"),
        (OWN | {"lr": "fast"}, "lr: 'fast' is not float"),
        (OWN | {"trainable": 3}, "trainable: 3 is not"),
        ("a: [", "is not YAML"),
        ("just words", "holds no settings"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, settings: Any, message: str) -> None:
    path = written(tmp_path, settings)
    with pytest.raises(InputError, match=message) as raised:
        read_reference_config(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.yaml cannot be read: No such file"):
        read_reference_config(tmp_path / "nothing.yaml")
