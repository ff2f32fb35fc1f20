"""The demo's adapter: where its maps are, that diffusers' pipeline agrees, and that the UNet's shapes fit it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, StableDiffusionPipeline, T2IAdapter
from PIL import Image
from torch import Tensor

import tav_opt
from tav_opt import cli, editing, models
from tav_opt.conditions import t2i_adapter
from tav_opt.config import Control, EditConfig, InputError
from tav_opt.contract import ClipInfo
from tav_opt.demo import clips, ways, world
from tav_opt.demo.subjects import shapes
from tav_opt.engines.pytorch import TorchEngine, load_networks
from tav_opt.export.conditions import _blocks
from tav_opt.models import StableDiffusion

DEMO = Path(tav_opt.__file__).parent / "demo"
SIDE, STEPS = 64, 4
SHAPES = shapes()


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    """The demo's, inflated, but silent over time."""
    if not (DEMO / "model").is_dir() or not (DEMO / "control").is_dir():
        pytest.skip("the package has no trained model or adapter")
    found = models.load(DEMO / "model")
    for name, value in found.unet.named_parameters():
        if "attn_temp.to_out" in name:
            value.data.zero_()
    return found


@torch.no_grad()
def test_a_frame_that_follows_it_is_diffusers_pipeline(sd: StableDiffusion) -> None:
    info = ClipInfo(
        base="demo", base_hash="0" * 64, prompt="", frames=1, height=SIDE, width=SIDE, fps=8.0, inversion_steps=4
    )
    start = torch.randn(1, 6, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    networks = load_networks(sd, {}, {"place": DEMO / "control"})
    engine = TorchEngine(sd=sd, info=info, source_latents=start, inverted_latents=start, networks=networks)
    drawn = ways.along(ways.WAYS["hop"], 1, SIDE)
    config = EditConfig(
        prompts=("a tiger on the beach",), steps=STEPS, guidance_scale=3.0, controls=(Control(name="place", scale=0.8),)
    )
    text = editing.encode_prompts(engine, config)
    following = editing.conditions(engine, config, {"place": drawn})
    (found,) = editing.sample(engine, config, text, start, following=following)
    expected = _by_diffusers(start, drawn[0])
    torch.testing.assert_close(found[:, :, 0], expected, atol=1e-4, rtol=1e-4)
    (plain,) = editing.sample(engine, EditConfig(prompts=config.prompts, steps=STEPS, guidance_scale=3.0), text, start)
    assert (found - plain).abs().max() > 0.05


def _by_diffusers(start: Tensor, picture: np.ndarray) -> Tensor:
    base = StableDiffusionPipeline.from_pretrained(DEMO / "model", torch_dtype=torch.float32, safety_checker=None)
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    adapter = T2IAdapter.from_pretrained(DEMO / "control", torch_dtype=torch.float32)
    pipeline = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a tiger on the beach",
        image=Image.fromarray(picture).convert("L"),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        adapter_conditioning_scale=0.8,
        latents=start[:, :, 0],
        output_type="latent",
    ).images


def test_it_is_small(sd: StableDiffusion) -> None:
    assert sum(file.stat().st_size for file in (DEMO / "control").iterdir()) < 5_000_000


def test_the_unets_graph_has_the_shapes_of_its_features(sd: StableDiffusion) -> None:
    frames = t2i_adapter.load(DEMO / "control", sd.unet.config, sd.vae_factor)
    made = dict(zip(frames.names, frames(torch.zeros(1, 3, SIDE, SIDE)), strict=True))
    asked = dict(_blocks(sd.unet.config, (6, 1, SIDE // 4, SIDE // 4)))
    assert asked == {name: tuple(feature.shape) for name, feature in made.items()}


def test_an_adapter_is_refused_where_its_features_do_not_fit(tmp_path: Path) -> None:
    plain = {"down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"], "block_out_channels": [8, 16, 32]}
    like_xl = plain | {"down_block_types": plain["down_block_types"][::-1]}
    for kind in ("full_adapter", "full_adapter_xl"):
        T2IAdapter(1, [8, 16, 32], 1, 8, adapter_type=kind).save_pretrained(tmp_path / kind)
    with pytest.raises(InputError, match="3 blocks, the first without attention"):
        t2i_adapter.load(tmp_path / "full_adapter_xl", plain, 4)
    with pytest.raises(InputError, match="attention in all blocks but the last"):
        t2i_adapter.load(tmp_path / "full_adapter", like_xl, 8)
    with pytest.raises(InputError, match="its downscale_factor is 8, the base's 16"):
        t2i_adapter.load(tmp_path / "full_adapter_xl", like_xl, 8)
    assert len(t2i_adapter.load(tmp_path / "full_adapter_xl", like_xl, 4).names) == 3


@pytest.mark.parametrize("name", ways.WAYS)
def test_an_ellipse_is_drawn_where_the_way_is(name: str) -> None:
    path, side = ways.WAYS[name], 96
    drawn = ways.along(path, 9, side)
    assert drawn.shape == (9, side, side, 3) and set(np.unique(drawn)) == {0, 255}
    assert abs(ways.middles(drawn) - [[side * at for at in path(part / 8)] for part in range(9)]).max() < 1.5


def test_silhouettes_of_a_clip_are_where_its_track_is() -> None:
    crossing = clips.Crossing(name="x", subject="red circle", place="beach", scale=0.5, path=(0.7, 0.3), hops=2)
    drawn = clips.silhouettes(crossing, SHAPES["red circle"] * 3)
    _, track = clips.animate(crossing, SHAPES["red circle"] * 3)
    assert drawn.shape == (clips.FRAMES, 64, 64, 3) and set(np.unique(drawn)) == {0, 255}
    assert abs(ways.middles(drawn) - track).max() < 1.5


def test_a_composites_silhouette_is_where_its_subject_is() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scene = world.draw_scene(rng, list(SHAPES))
        made = world.compose_whole(scene, SHAPES, rng)
        edge = made.silhouette[[0, -1]].any() or made.silhouette[:, [0, -1]].any()
        if not edge:  # of one that is cut off the middle is another
            rows, columns = np.nonzero(made.silhouette)
            middle = ((columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2)
            assert abs(np.array(middle) - made.middle).max() < 2
        assert 0.03 < (made.silhouette > 0).mean() < 0.9


def test_an_ellipse_fills_the_box_of_a_silhouette() -> None:
    silhouette = np.zeros((64, 64), np.uint8)
    silhouette[10:30, 5:41] = 255
    drawn = ways.ellipse(silhouette)
    rows, columns = np.nonzero(drawn)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 29, 5, 40)
    assert abs(drawn.astype(bool).sum() / (20 * 36) - np.pi / 4) < 0.06
    assert not ways.ellipse(np.zeros((8, 8), np.uint8)).any()


def test_the_demos_way_is_refused_on_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--control", "--model", "sd15/", "--out", str(tmp_path / "out")]
    assert cli.main(["demo", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--control is for the package's own model, not sd15/" in error
    assert not (tmp_path / "out").exists()
