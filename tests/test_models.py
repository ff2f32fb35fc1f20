"""Loading parts of a Stable Diffusion directory, encoding and decoding, and every way a directory can be wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tav_opt import models
from tav_opt.config import InputError
from tav_opt.video.pixels import to_frames, to_host, to_unit


@pytest.fixture(scope="module")
def sd(golden):
    return models.load(golden / "reference_checkpoint" / "sd")


@pytest.fixture
def copy(golden, tmp_path):
    return shutil.copytree(golden / "reference_checkpoint" / "sd", tmp_path / "sd")


def test_vae_and_text_equal_the_reference(golden, sd):
    expected = load_file(golden / "reference_checkpoint" / "end_to_end.safetensors")
    text = models.encode_prompt(sd, ["a panda is skiing", ""])
    assert (text[:1] - expected["prompt_embedding"]).abs().max() < 1e-5
    assert (text[1:] - expected["empty_prompt_embedding"]).abs().max() < 1e-5
    assert torch.equal(models.tokenize(sd.tokenizer, ["a panda is skiing"]), expected["prompt_input_ids"])
    # Files hold 8 bits a channel, the reference's source does not: half a step of 1/255 is the difference allowed.
    frames = (expected["source_video_unit_range"][0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    latents = models.encode_video(sd, frames)
    assert (latents - expected["source_latents_mean_scaled"]).abs().max() < 2e-2


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_frame_batches_change_nothing(sd, batch):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    whole = models.encode_video(sd, frames, batch=5)
    parts = models.encode_video(sd, frames, batch=batch)
    assert whole.shape == (1, 4, 5, 4, 6) and torch.allclose(whole, parts, atol=1e-6)
    decoded = models.decode_video(sd, torch.cat([whole, -whole]), batch=batch)
    again = np.concatenate([models.decode_video(sd, whole), models.decode_video(sd, -whole)])
    assert decoded.shape == (2, 5, 32, 48, 3) and abs(decoded.astype(int) - again).max() <= 1


def test_posterior_sample_is_seeded_and_differs_from_the_mean(sd):
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    one, two = (models.encode_video(sd, frames, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, two) and not torch.allclose(one, models.encode_video(sd, frames))


def test_pixels_survive_the_way_there_and_back():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    assert np.array_equal(to_host(to_frames(to_unit(frames))), frames)


def test_sd1_config_without_mid_block_type_and_safetensors_unet_load(golden, copy):
    weights = torch.load(copy / "unet" / "diffusion_pytorch_model.bin", weights_only=True)
    (copy / "unet" / "diffusion_pytorch_model.bin").unlink()
    save_file(weights, copy / "unet" / "diffusion_pytorch_model.safetensors")
    ours = models.load_video_unet(copy).state_dict()
    theirs = models.load_video_unet(golden / "reference_checkpoint" / "sd").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in weights)


def test_dtype_is_respected(golden):
    unet = models.load_video_unet(golden / "unet_sd1" / "unet3d", dtype=torch.bfloat16)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("height, width", [(60, 64), (64, 7), (0, 64)])
def test_sizes_that_the_vae_cannot_halve_are_refused(height, width):
    with pytest.raises(InputError, match=f"{width}×{height}"):
        models.check_size(height, width, 8)


def test_a_long_prompt_names_the_words_beyond(sd):
    with pytest.raises(InputError, match="kiing"):
        models.tokenize(sd.tokenizer, ["a panda " * 9 + "is skiing"])


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_unpickle_code_are_refused(copy, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = next((copy / part).glob("*.bin"))
    file.write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(InputError, match=file.name):
        models.load(copy)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_corrupt_weights_are_refused(copy, part):
    for file in (copy / part).glob("*.bin"):
        file.rename(
            file.with_name("diffusion_pytorch_model.safetensors" if part != "text_encoder" else "model.safetensors")
        )
    with pytest.raises(InputError, match="safetensors"):
        models.load(copy)


def test_missing_parts_and_files_are_named(copy, tmp_path):
    shutil.rmtree(copy / "vae")
    with pytest.raises(InputError, match="vae"):
        models.load(copy)
    with pytest.raises(InputError, match="nowhere"):
        models.load(tmp_path / "nowhere")
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json"):
        models.load_video_unet(copy)


def test_weights_of_another_shape_are_refused(copy):
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(InputError, match="do not fit"):
        models.load_video_unet(copy)


def test_the_loop_has_float32_around_a_network_of_halves(golden):
    sd = models.load(golden / "reference_checkpoint" / "sd", dtype=torch.bfloat16)
    latents = models.encode_video(sd, np.zeros((2, 32, 32, 3), np.uint8))
    text = models.encode_prompt(sd, [""])
    noise = sd.predict(latents, 1, text)
    assert latents.dtype == noise.dtype == torch.float32
    assert torch.equal(noise, noise.bfloat16()), "the network has not"
    assert sd.predict_with_features(latents, 1, text)[0].dtype == torch.float32
