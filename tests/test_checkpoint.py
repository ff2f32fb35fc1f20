"""Checkpoints: whole, verified, refused when anything about them is wrong."""

from __future__ import annotations

import shutil

import pytest
import torch

from tav_opt import checkpoint, files, models
from tav_opt.base.directory import Base
from tav_opt.config import InputError
from tav_opt.contract import ClipInfo
from tav_opt.engines.pytorch import open_checkpoint
from tav_opt.unet import clip_value_names

PAPER = ("attn1.to_q", "attn2.to_q", "attn_temp")


@pytest.fixture(scope="module")
def saved(golden, tmp_path_factory):
    """A checkpoint whose values are the reference's tuned ones."""
    tuned = models.load_video_unet(golden / "reference_checkpoint" / "tuned")
    base = golden / "reference_checkpoint" / "sd"
    names = clip_value_names(tuned, PAPER)
    latents = torch.randn(1, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    made = checkpoint.Checkpoint(
        info=ClipInfo(
            base=str(base), base_hash=Base.at(base).hash, prompt="a man is skiing",
            frames=5, height=64, width=64, fps=8.0, inversion_steps=8,
        ),
        values={name: value for name, value in tuned.named_parameters() if name in names},
        source_latents=latents,
        inverted_latents=-latents,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint") / "ckpt"
    checkpoint.save(made, folder, {"steps": 10}, torch.float32)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "ckpt")


def test_the_reference_model_is_its_base_and_the_clip_values(golden, saved):
    """Nothing else than the clip's own values changed in the reference's tuning, so nothing else need be kept."""
    ours = models.load_video_unet(saved).state_dict()
    theirs = models.load_video_unet(golden / "reference_checkpoint" / "tuned").state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_engine_opens_it(saved):
    engine = open_checkpoint(saved)
    assert engine.info.prompt == "a man is skiing" and engine.inverted_latents.shape == (1, 4, 5, 8, 8)


def test_another_base_is_refused(copy, golden, tmp_path):
    other = shutil.copytree(golden / "reference_checkpoint" / "sd", tmp_path / "other")
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    with pytest.raises(InputError, match="use that model"):
        open_checkpoint(copy, base=str(other))


@pytest.mark.parametrize("name", [checkpoint.VALUES, checkpoint.LATENTS])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_altered_files_are_refused(copy, name, harm):
    data = bytearray((copy / name).read_bytes())
    data[-5] ^= 1
    match harm:
        case "flip":
            (copy / name).write_bytes(data)
        case "truncate":
            (copy / name).write_bytes(data[:100])
        case "remove":
            (copy / name).unlink()
    with pytest.raises(InputError, match=name):
        checkpoint.load(copy)


def test_half_written_and_unknown_folders_are_refused(copy, tmp_path):
    (copy / checkpoint.DESCRIPTION).unlink()
    (copy / "resume.safetensors").touch()
    with pytest.raises(InputError, match="half-written"):
        checkpoint.load(copy)
    with pytest.raises(InputError, match="not a checkpoint"):
        checkpoint.load(tmp_path)


def test_values_of_another_unet_are_refused(copy):
    tuned = checkpoint.load(copy)
    with pytest.raises(InputError, match="does not fit"):
        models.put_values(models.load_video_unet(tuned.info.base), {"conv_in.weight": torch.zeros(3)})


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), files.whole(tmp_path / "x.bin") as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(InputError, match="disk full"), files.whole(tmp_path / "x.bin"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
