"""Settings of edits that a clip brings with it, from the reference's YAML to what is sampled; prompts with weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exported import Exported, export_once
from fakes import FakeEngine, answered, editor

import tav_opt
from tav_opt import cli, reference, video
from tav_opt.cli.common import given_settings
from tav_opt.cli.edit import Edit
from tav_opt.config import EditConfig, InputError, literal_weights
from tav_opt.contract import ClipInfo, to_tensors
from tav_opt.ddim import Schedule
from tav_opt.export import exporting
from tav_opt.files import read_json

OWN = {"steps": 2, "guidance_scale": 7.5, "inversion": True}


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def sd(shallow: Path) -> Path:
    return shallow


def test_the_references_files_say_how_their_clips_are_edited(shared: Path) -> None:
    for path in sorted((shared / "reference_configs").glob("*.yaml")):
        assert reference.read_reference_config(path).edit_defaults == {
            "steps": 50,
            "guidance_scale": 12.5,
            "inversion": True,
        }


def yaml_of(folder: Path, sd: Path, validation: str) -> Path:
    frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    video.write(folder / "clip", frames, 8)
    text = f"""
pretrained_model_path: {sd}
output_dir: {folder / "ckpt"}
train_data: {{video_path: {folder / "clip"}, prompt: a panda, n_sample_frames: 4, width: 64, height: 64,
  sample_frame_rate: 1}}
validation_data: {{{validation}}}
max_train_steps: 1
"""
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def tuned(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yaml")
    path = yaml_of(folder, sd, "guidance_scale: 3.5, num_inference_steps: 2, use_inv_latent: False, num_inv_steps: 2")
    assert cli.main(["tune", "--config", str(path)]) == 0
    return folder / "ckpt"


def test_a_checkpoint_keeps_them_and_the_command_says_and_uses_them(tuned: Path, tmp_path: Path, capsys) -> None:
    assert read_json(tuned / "checkpoint.json")["edit"] == {"steps": 2, "guidance_scale": 3.5, "inversion": False}
    assert cli.main(["edit", str(tuned), "--prompt", "a cat", "--out", str(tmp_path / "own")]) == 0
    said = capsys.readouterr().err
    assert "steps 2, guidance scale 3.5, inversion False, as the clip brings it" in said
    usual = ["edit", str(tuned), "--prompt", "a cat", "--steps", "2", "--guidance", "3.5", "--no-inversion"]
    assert cli.main([*usual, "--out", str(tmp_path / "told")]) == 0
    assert "as the clip brings it" not in capsys.readouterr().err
    own, told = (video.read(tmp_path / name).frames for name in ("own", "told"))
    assert np.array_equal(own, told)


def test_the_command_line_beats_the_checkpoint_even_with_the_packages_own_default(tuned: Path, tmp_path: Path) -> None:
    args, given = given_settings(Edit, "x", [str(tuned), "--prompt", "a", "--guidance", "12.5"])
    info = ClipInfo.from_json(read_json(tuned / "checkpoint.json"))
    used = info.edited(args, given)
    assert (given, used.guidance_scale, used.steps, used.inversion) == ({"guidance_scale"}, 12.5, 2, False)


def test_prompts_alone_take_the_clips_and_settings_stay_as_they_are() -> None:
    engine = FakeEngine()
    engine.info = replace(engine.info, edit=OWN)
    tav_opt.edit(engine, "a panda")
    assert engine.batches == [2, 2]
    engine.batches.clear()
    tav_opt.edit(engine, EditConfig(prompts="a panda", steps=3))
    assert engine.batches == [2, 2, 2]


@pytest.mark.parametrize(
    ("left_out", "steps", "guidance"), [((), 3, 12.5), (("steps",), 2, 12.5), (("steps", "guidance_scale"), 2, 7.5)]
)
def test_a_request_that_leaves_them_out_gets_the_clips(left_out, steps: int, guidance: float) -> None:
    engine = FakeEngine()
    engine.info = replace(engine.info, edit=OWN)
    responses, report = answered(editor(engine), to_tensors("toy", EditConfig(prompts="a", steps=3), left_out=left_out))
    assert len(engine.batches) == steps and f"guidance_scale={guidance:g}" in report.line(prompts=False)
    assert json.loads(responses[-1]["metadata"][0])["steps"] == steps


@pytest.mark.parametrize(
    "edit", [[], {"stepz": 3}, {"steps": "3"}, {"steps": True}, {"steps": 0}, {"guidance_scale": float("nan")}]
)
def test_a_description_that_lies_is_refused(tuned: Path, edit: object) -> None:
    with pytest.raises(InputError):
        ClipInfo.from_json(read_json(tuned / "checkpoint.json") | {"edit": edit})


def test_an_exported_clip_has_them_and_clips_of_before_have_none(tuned: Path, exported: Exported) -> None:
    clip = exporting.export(tuned, exported.repository, name="of-yaml")
    assert tav_opt.load(clip).info.edit == {"steps": 2, "guidance_scale": 3.5, "inversion": False}
    old = read_json(clip / "manifest.json")
    del old["edit"]
    assert ClipInfo.from_json(old).edit == {}


def test_a_schedule_of_another_kind_goes_through_the_whole_chain(shared: Path, sd: Path, tmp_path: Path) -> None:
    """Zero terminal SNR, v-prediction and trailing timesteps: tuned to other values, exported and edited with them."""
    base = Path(shutil.copytree(sd, tmp_path / "sd"))
    config = base / "scheduler" / "scheduler_config.json"
    shutil.copyfile(shared / "inputs" / "ztsnr_v.scheduler_config.json", config)
    path = yaml_of(tmp_path, base, "num_inv_steps: 2")
    assert cli.main(["tune", "--config", str(path)]) == 0
    other = tmp_path / "other"
    other.mkdir()
    assert cli.main(["tune", "--config", str(yaml_of(other, sd, "num_inv_steps: 2"))]) == 0
    losses = [(folder / "ckpt" / "loss.csv").read_text() for folder in (tmp_path, other)]
    assert losses[0] != losses[1]
    engine = tav_opt.load(tmp_path / "ckpt")
    expected = Schedule.from_config(read_json(config))
    assert engine.schedule == expected and expected.alphas_cumprod[-1] == 0
    assert expected.timesteps(50)[:3] == [999, 979, 959]
    assert (
        np.isfinite(engine.inverted_latents).all() and tav_opt.edit(engine, EditConfig(prompts="a cat", steps=2)).any()
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "a (red:1.3) car",
        "((masterpiece)), a car",
        "a [blurry] car",
        "a car <lora:x:0.8>",
        "a car BREAK a dog",
        "a AND b",
    ],
)
def test_weights_of_other_programs_are_noticed(prompt: str) -> None:
    said = literal_weights(["a car", prompt])
    assert said and "\n" not in said


@pytest.mark.parametrize(
    "prompt", ["a cat (sitting)", "a cat and a dog", "A CAT AND A DOG", "at 10:30", "a car, 16:9", "x < y", "BREAKFAST"]
)
def test_prose_is_not(prompt: str) -> None:
    assert literal_weights([prompt]) is None
