"""What does not fit an edit or its base, through the commands: one line, exit status 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from controls import maps_of, randomised, write_controlnet
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from exported import FRAMES, SIDE, tuned
from safetensors.torch import save_file

from tav_opt import checkpoint, cli, video


@pytest.fixture(scope="module")
def base(golden: Path) -> Path:
    return golden / "reference_checkpoint" / "sd"


@pytest.fixture(scope="module")
def things(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a network that fits it, and all that does not."""
    folder = tmp_path_factory.mktemp("things")
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    checkpoint.save(tuned(base, frames, seed=1), folder / "ckpt", settings={})
    write_controlnet(base, folder / "fits", 1)
    unet = UNet2DConditionModel.load_config(base / "unet")
    shared = {name: unet[name] for name in ("down_block_types", "layers_per_block", "norm_num_groups")}
    for name, widths, text in (("text", unet["block_out_channels"], 64), ("widths", [32, 32, 64, 64], 32)):
        net = ControlNetModel(**shared, block_out_channels=widths, cross_attention_dim=text, attention_head_dim=2)
        randomised(net, 2).save_pretrained(folder / name)
    T2IAdapter(3, [16, 32, 32, 64], 1, 8).save_pretrained(folder / "deep")
    for name, count in (("maps", FRAMES), ("longer", FRAMES + 1), ("shorter", FRAMES - 1)):
        video.write(folder / name, maps_of(count, SIDE, SIDE, 3), 8)
    (folder / "words.png").write_text("no picture")
    halves = {"lora_A": torch.ones(3, 16), "lora_B": torch.ones(16, 3)}
    layers = ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "text_encoder_2.layers.0.q_proj")
    lora = {f"{layer}.{half}.weight": value.clone() for layer in layers for half, value in halves.items()}
    save_file(lora, folder / "xl.safetensors")
    save_file({"<cat>": torch.ones(768)}, folder / "wide.safetensors")
    save_file({"panda": torch.ones(32)}, folder / "known.safetensors")
    video.write(folder / "clip.mp4", frames, 8)
    return folder


EDIT = "edit {ckpt} --prompt x --steps 2 --out {out}/edit.mp4"
FITS = f"{EDIT} --controlnet pose={{fits}}"
TUNE = "tune --model {base} --video {clip.mp4} --prompt x --frames 2 --height 64 --width 64 --steps 1 --out {out}/ckpt"
BAD = {
    "longer maps": (f"{FITS} --control pose={{longer}}", "4 frames"),
    "shorter maps": (f"{FITS} --control pose={{shorter}}", "4 frames"),
    "a map that is no image": (f"{FITS} --control pose={{words.png}}", "words.png"),
    "maps that are not there": (f"{FITS} --control pose={{out}}/none.mp4", "none.mp4 does not exist"),
    "a ControlNet of other text": (f"{EDIT} --control pose={{maps}} --controlnet pose={{text}}", "cross_attention_dim"),
    "a ControlNet of other widths": (f"{EDIT} --control pose={{maps}} --controlnet pose={{widths}}", "block_out_chann"),
    "an adapter of other widths": (
        f"{EDIT} --control pose={{maps}} --adapter pose={{deep}}",
        "channels is [16, 32, 32",
    ),
    "a network of another kind": (
        f"{EDIT} --control pose={{maps}} --controlnet pose={{deep}}",
        "not a ControlNetModel",
    ),
    "an unknown kind": (f"{FITS} --control hands=source", "hands"),
    "a control without a network": (f"{EDIT} --control pose={{maps}}", "'pose' has no network"),
    "a network without a control": (FITS, "follows nothing"),
    "a LoRA of SDXL": (f"{TUNE} --lora {{xl.safetensors}}", "Stable Diffusion XL"),
    "an embedding of another width": (f"{TUNE} --embedding {{wide.safetensors}}", "width 768"),
    "a token that exists": (f"{TUNE} --embedding {{known.safetensors}}", "'panda' exists already"),
}


@pytest.mark.parametrize("case", BAD)
def test_it_is_one_line_and_nothing_is_written(
    base: Path, things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    line, words = BAD[case]
    given = {path.name: str(path) for path in things.iterdir()} | {"base": str(base), "out": str(tmp_path)}
    for name, value in given.items():
        line = line.replace(f"{{{name}}}", value)
    capsys.readouterr()
    assert cli.main(line.split()) == 2
    told = capsys.readouterr().err.strip()
    assert words in told and len(told.splitlines()) == 1, told
    assert not list(tmp_path.iterdir())


def test_one_that_fits_is_taken(base: Path, things: Path, tmp_path: Path) -> None:
    """What the others are refused for is all that is wrong with them."""
    line = f"edit {things / 'ckpt'} --prompt x --steps 2 --out {tmp_path}/edit.gif"
    assert cli.main([*line.split(), f"--controlnet=pose={things / 'fits'}", f"--control=pose={things / 'maps'}"]) == 0
    assert (tmp_path / "edit.gif").is_file()


def test_a_network_that_does_not_fit_is_refused_before_a_graph_is_exported(
    things: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--repository={tmp_path}", f"--controlnet=pose={things / 'text'}"]
    assert cli.main(["export", str(things / "ckpt"), *given]) == 2
    told = capsys.readouterr()
    assert "cross_attention_dim is 64" in told.err.splitlines()[-1] and not told.out
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]
