"""Conditions against diffusers: its own pipelines on one frame, its own networks on each of several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import owned
import pytest
import torch
from controls import maps_of, randomised, write_adapter, write_controlnet
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from safetensors.torch import save_file
from torch import Tensor

from tav_opt import editing, models, windows
from tav_opt.conditions import condition
from tav_opt.config import Control, EditConfig, InputError
from tav_opt.contract import ClipInfo
from tav_opt.engines.pytorch import TorchEngine, load_networks
from tav_opt.memory import eager
from tav_opt.memory.control_networks import network_bytes
from tav_opt.models import StableDiffusion

SIDE, STEPS, SCALE = 64, 10, 7.5
PROMPT = "a panda is skiing"
SHARED_WITH_UNET = (
    "in_channels",
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "norm_num_groups",
)


@pytest.fixture(scope="module")
def base(golden: Path) -> Path:
    return golden / "reference_checkpoint" / "sd"


@pytest.fixture(scope="module")
def places(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("networks")
    made = {name: write_controlnet(base, folder / name, seed) for seed, name in enumerate(("pose", "canny"))}
    made |= {name: write_adapter(base, folder / name, seed) for seed, name in enumerate(("depth", "seg"), start=5)}
    return made | {"sketch": write_adapter(base, folder / "sketch", 9, in_channels=1, kind="light_adapter")}


@pytest.fixture(scope="module")
def sd(base: Path) -> StableDiffusion:
    """Inflated, but silent over time."""
    found = models.load(base)
    for name, value in found.unet.named_parameters():
        if "attn_temp.to_out" in name:
            value.data.zero_()
    return found


def _engine(sd: StableDiffusion, places: dict[str, Path], frames: int) -> TorchEngine:
    info = ClipInfo(
        base="sd", base_hash="0" * 64, prompt="", frames=frames, height=SIDE, width=SIDE, fps=8.0, inversion_steps=4
    )
    side = SIDE // sd.vae_factor
    zeros = torch.zeros(1, 4, frames, side, side)
    nets = load_networks(
        sd,
        {name: places[name] for name in ("pose", "canny")},
        {name: places[name] for name in ("depth", "seg", "sketch")},
    )
    return TorchEngine(sd=sd, info=info, source_latents=zeros, inverted_latents=zeros, networks=nets)


def _ours(engine: TorchEngine, controls: tuple[Control, ...]) -> tuple[Tensor, Tensor]:
    """Where sampling started, and what it came to."""
    config = EditConfig(prompts=(PROMPT,), steps=STEPS, guidance_scale=SCALE, inversion=False, controls=controls)
    maps = {one.name: _maps(one.name, engine.info.frames) for one in controls}
    editing.check(config)
    following = editing.conditions(engine, config, maps)
    start = editing.start_latents(engine, config)
    text = editing.encode_prompts(engine, config)
    return start, next(editing.sample(engine, config, text, start, following=following))


def _maps(name: str, frames: int) -> np.ndarray:
    return maps_of(frames, SIDE, SIDE, seed=len(name))


def _pictures(controls: tuple[Control, ...]) -> list[Tensor]:
    return [torch.from_numpy(_maps(one.name, 1)).permute(0, 3, 1, 2).float() / 255 for one in controls]


def _parts(sd: StableDiffusion, base: Path) -> dict[str, Any]:
    scheduler = DDIMScheduler.from_config(sd.base.configs["scheduler"], clip_sample=False)
    parts = owned.pipeline(base).components | {"scheduler": scheduler, "requires_safety_checker": False}
    return {name: part for name, part in parts.items() if name != "image_encoder"}


def _given(start: Tensor) -> dict[str, Any]:
    return {
        "prompt": PROMPT,
        "negative_prompt": "",
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "latents": start[:, :, 0],
        "output_type": "latent",
    }


@pytest.mark.parametrize(
    "controls",
    [
        (Control(name="pose"),),
        (Control(name="pose", scale=0.6, start=0.2, end=0.7),),
        (Control(name="pose", scale=0.8, end=0.5), Control(name="canny", scale=1.5, start=0.3)),
    ],
    ids=["one", "scaled, in a window", "two"],
)
def test_a_frame_with_controlnets_is_diffusers_pipeline(
    sd: StableDiffusion, base: Path, places: dict[str, Path], controls: tuple[Control, ...]
) -> None:
    engine = _engine(sd, places, 1)
    start, found = _ours(engine, controls)
    nets = [ControlNetModel.from_pretrained(places[one.name]) for one in controls]
    pipeline = StableDiffusionControlNetPipeline(controlnet=nets, **_parts(sd, base))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        image=_pictures(controls),
        controlnet_conditioning_scale=[one.scale for one in controls],
        control_guidance_start=[one.start for one in controls],
        control_guidance_end=[one.end for one in controls],
        **_given(start),
    ).images
    plain = _ours(engine, ())[1]
    assert (found - plain).abs().max() > 0.05
    torch.testing.assert_close(found[:, :, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "controls",
    [
        (Control(name="depth", scale=0.7),),
        (Control(name="sketch"),),
        (Control(name="depth", scale=0.8), Control(name="seg", scale=1.3)),
    ],
    ids=["one", "grey", "two"],
)
def test_a_frame_with_adapters_is_diffusers_pipeline(
    sd: StableDiffusion, base: Path, places: dict[str, Path], controls: tuple[Control, ...]
) -> None:
    engine = _engine(sd, places, 1)
    start, found = _ours(engine, controls)
    nets = [T2IAdapter.from_pretrained(places[one.name]) for one in controls]
    several = len(nets) > 1
    pipeline = StableDiffusionAdapterPipeline(adapter=MultiAdapter(nets) if several else nets[0], **_parts(sd, base))
    pipeline.set_progress_bar_config(disable=True)
    pictures = _pictures(controls)
    if controls[0].name == "sketch":
        pictures = [picture.mean(1, keepdim=True) for picture in pictures]
    scales = [one.scale for one in controls]
    expected = pipeline(
        image=pictures if several else pictures[0],
        adapter_conditioning_scale=scales if several else scales[0],
        height=SIDE,
        width=SIDE,
        **_given(start),
    ).images
    plain = _ours(engine, ())[1]
    assert (found - plain).abs().max() > 0.05
    torch.testing.assert_close(found[:, :, 0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_frames_residuals_are_the_image_networks_on_that_frame(
    sd: StableDiffusion, places: dict[str, Path]
) -> None:
    frames, generator = 3, torch.Generator().manual_seed(0)
    controls = (Control(name="pose", scale=0.5), Control(name="depth", scale=2.0))
    nets = _engine(sd, places, frames).networks
    maps = {one.name: _maps(one.name, frames) for one in controls}
    made = condition.conditions(nets, controls, maps, (frames, SIDE, SIDE, 3), torch.device("cpu"))
    latents = torch.randn(2, 4, frames, SIDE // sd.vae_factor, SIDE // sd.vae_factor, generator=generator)
    text = torch.randn(2, 7, sd.unet.config.cross_attention_dim, generator=generator)
    found = condition.told(made, latents, torch.tensor(301), text)
    assert not isinstance(found, Tensor) and found["text"] is text
    controlnet = ControlNetModel.from_pretrained(places["pose"])
    adapter = T2IAdapter.from_pretrained(places["depth"])
    for row in range(2):
        for frame in range(frames):
            picture, other = (torch.from_numpy(maps[name][[frame]]).permute(0, 3, 1, 2) / 255 for name in maps)
            down, mid = controlnet(latents[[row], :, frame], 301, text[[row]], picture, return_dict=False)
            expected = {f"{condition.DOWN}.{n}": 0.5 * x for n, x in enumerate(down)} | {condition.MID: 0.5 * mid}
            expected |= {f"{condition.INSIDE}.{n}": 2.0 * x for n, x in enumerate(adapter(other))}
            assert expected.keys() | {"text"} == found.keys()
            for name, residual in expected.items():
                torch.testing.assert_close(found[name][row, [frame]], residual, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_both_kinds_at_once_are_what_the_image_unet_makes_of_them(
    sd: StableDiffusion, base: Path, places: dict[str, Path]
) -> None:
    controls = (Control(name="pose", scale=0.5), Control(name="depth"), Control(name="canny"))
    engine = _engine(sd, places, 1)
    made = editing.conditions(
        engine, EditConfig(prompts=("a",), controls=controls), {one.name: _maps(one.name, 1) for one in controls}
    )
    latents = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    text = engine.encode_text(["a", "b"])
    told = condition.told(made, latents, torch.tensor(301), text)
    assert not isinstance(told, Tensor)
    several = {name: [told[f"{name}.{n}"][:, 0] for n in range(count)] for name, count in _counts(told).items()}
    expected = owned.pipeline(base).unet(  # type: ignore[operator]
        latents[:, :, 0], 301, text, mid_block_additional_residual=told[condition.MID][:, 0], **several
    )
    torch.testing.assert_close(engine.predict(latents, 301, told)[:, :, 0], expected.sample, atol=2e-5, rtol=1e-4)


def _counts(told: dict[str, Tensor]) -> dict[str, int]:
    names = [name.rpartition(".")[0] for name in told if "." in name]
    return {name: names.count(name) for name in names}


def test_a_window_is_the_same_over_the_wire() -> None:
    def acting(end: float) -> list[int]:
        one = condition.Condition(control=Control(name="pose", end=end), names=(), residuals=lambda *_: {})
        return [number for number in range(10) if one.acts(number, 10)]

    assert acting(0.7) == acting(float(np.float32(0.7))) == list(range(7))


def test_steps_outside_of_every_window_are_told_the_text_alone(sd: StableDiffusion, places: dict[str, Path]) -> None:
    seen = []
    engine = _engine(sd, places, 2)
    (made,) = editing.conditions(
        engine,
        EditConfig(prompts=("a",), controls=(Control(name="pose", start=0.25, end=0.75),)),
        {"pose": _maps("pose", 2)},
    )
    following = condition.Conditioned(lambda _l, _t, text: seen.append(text) or _l, [made], 8)
    latents, text = torch.zeros(1, 4, 2, 8, 8), engine.encode_text(["a"])
    for _ in range(8):
        following(latents, torch.tensor(5), text)
    assert [isinstance(one, Tensor) for one in seen] == [True] * 2 + [False] * 4 + [True] * 2


BAD = {
    "no maps": ((Control(name="pose"),), {}, "control 'pose' has no maps"),
    "no network": ((Control(name="hand"),), {"hand": None}, "'hand' has no network; there is canny, depth, pose"),
    "twice": ((Control(name="pose"), Control(name="pose")), {"pose": None}, "'pose' is given twice"),
    "idle maps": ((), {"pose": None}, "maps of 'pose', but no control"),
    "another length": ((Control(name="pose"),), {"pose": maps_of(3, SIDE, SIDE, 0)}, r"\(3, 64, 64, 3\).* 2 frames of"),
    "another size": ((Control(name="pose"),), {"pose": maps_of(2, SIDE, 32, 0)}, r"takes uint8 2 frames of 64×64"),
    "no time": ((Control(name="pose", start=0.5, end=0.5),), {"pose": None}, "start 0.5 is not before end 0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_belong_together_is_refused(sd: StableDiffusion, places: dict[str, Path], case: str) -> None:
    controls, maps, said = BAD[case]
    given = {name: _maps(name, 2) if one is None else one for name, one in maps.items()}
    with pytest.raises(InputError, match=said):
        editing.conditions(_engine(sd, places, 2), EditConfig(prompts=("a",), controls=controls), given)


def test_numbers_of_a_control_have_ranges() -> None:
    with pytest.raises(InputError, match=r"scale 11 is not within 0…10"):
        editing.check(EditConfig(prompts=("a",), controls=(Control(name="pose", scale=11),)))
    windowed = EditConfig(prompts=("a",), control_inversion=True, controls=(Control(name="pose", end=0.5),))
    with pytest.raises(InputError, match=r"a window of steps, 0…0\.5, with control inversion"):
        editing.check(windowed)
    with pytest.raises(InputError, match="would change nothing"):
        editing.check(replace(windowed, controls=()))


def test_networks_of_other_bases_and_other_files_are_refused(
    sd: StableDiffusion, base: Path, places: dict[str, Path], tmp_path: Path
) -> None:
    wide = ControlNetModel(
        cross_attention_dim=64, block_out_channels=(16, 32, 32, 32), norm_num_groups=8, attention_head_dim=4
    )
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match=r"for another base: its (cross_attention_dim is 64|layers)"):
        load_networks(sd, {"pose": tmp_path / "wide"}, {})
    T2IAdapter(3, [16, 32, 32, 64], 1, 8).save_pretrained(tmp_path / "deep")
    with pytest.raises(InputError, match=r"for another base: its channels is \[16, 32, 32, 64\]"):
        load_networks(sd, {}, {"depth": tmp_path / "deep"})
    with pytest.raises(InputError, match="is a 'T2IAdapter', not a ControlNetModel"):
        load_networks(sd, {"pose": places["depth"]}, {})
    with pytest.raises(InputError, match="a ControlNet and an adapter"):
        load_networks(sd, {"pose": places["pose"]}, {"pose": places["depth"]})
    with pytest.raises(InputError, match="neither a directory nor a hub id"):
        load_networks(sd, {"pose": "./nowhere"}, {})
    settings = {name: value for name, value in sd.unet.config.items() if name in SHARED_WITH_UNET}
    for case, given, said in (
        ("quarter", {"conditioning_embedding_out_channels": (8, 8, 16)}, "for another base: it halves maps to 1/4"),
        ("grey", {"conditioning_channels": 1}, "conditioning_channels 1 is not 3"),
        ("green", {"controlnet_conditioning_channel_order": "gbr"}, "'gbr' is neither rgb nor bgr"),
    ):
        ControlNetModel(**settings, **given).save_pretrained(tmp_path / case)
        with pytest.raises(InputError, match=said):
            load_networks(sd, {"pose": tmp_path / case}, {})
    single = places["pose"] / "diffusion_pytorch_model.safetensors"
    (tmp_path / "other.safetensors").write_bytes((places["depth"] / single.name).read_bytes())
    with pytest.raises(InputError, match="is no ControlNet for this base"):
        load_networks(sd, {"pose": tmp_path / "other.safetensors"}, {})


HINT = {"conv_in": 0, "conv_out": 14} | {f"blocks.{number}": 2 + 2 * number for number in range(6)}
"""Of the convolutions that look at maps, in ControlNet's own files."""


def _own_name(name: str, layers: int, blocks: int) -> str:
    """A ControlNet's parameter as its authors name it."""
    part, _, kind = name.rpartition(".")
    if part.startswith("controlnet_cond_embedding."):
        return f"input_hint_block.{HINT[part.partition('.')[2]]}.{kind}"
    if part.startswith("controlnet_down_blocks."):
        return f"zero_convs.{part.rpartition('.')[2]}.0.{kind}"
    if part == "controlnet_mid_block":
        return f"middle_block_out.0.{kind}"
    return owned.unet_name(name, layers, blocks)


@pytest.mark.parametrize("layout", ["diffusers", "its authors'"])
def test_a_single_file_is_the_same_network(sd: StableDiffusion, tmp_path: Path, layout: str) -> None:
    settings = {name: value for name, value in sd.unet.config.items() if name in SHARED_WITH_UNET}
    net = randomised(ControlNetModel(**settings), 3)
    tensors = net.state_dict()
    if layout != "diffusers":
        counts = settings["layers_per_block"], len(settings["block_out_channels"])
        tensors = {f"control_model.{_own_name(name, *counts)}": value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "own.safetensors")
    (found,) = load_networks(sd, {"pose": tmp_path / "own.safetensors"}, {}).values()
    torch.manual_seed(4)
    given = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 16, 32), torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        down, mid = net(*given, return_dict=False)
    *others, maps = given
    made = found.run(**dict(zip(("latents", "timestep", "text"), others, strict=True)), **found.see(maps=maps))
    for name, expected in zip(found.names, (*down, mid), strict=True):
        torch.testing.assert_close(made[name], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_controlnet_that_reads_blue_first_is_diffusers(sd: StableDiffusion, tmp_path: Path) -> None:
    settings = {name: value for name, value in sd.unet.config.items() if name in SHARED_WITH_UNET}
    net = randomised(ControlNetModel(**settings, controlnet_conditioning_channel_order="bgr"), 3)
    net.save_pretrained(tmp_path)
    (found,) = load_networks(sd, {"pose": tmp_path}, {}).values()
    torch.manual_seed(4)
    latents, text, maps = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32), torch.rand(1, 3, SIDE, SIDE)
    expected = net(latents, 301, text, maps).mid_block_res_sample
    made = found.following(maps, 1.0)(latents[:, :, None], torch.tensor(301), text)
    torch.testing.assert_close(made[condition.MID][:, 0], expected, atol=1e-5, rtol=1e-4)
    turned = found.following(maps.flip(1), 1.0)(latents[:, :, None], torch.tensor(301), text)
    assert (turned[condition.MID][:, 0] - expected).abs().max() > 1e-3


def test_a_controlnet_sees_its_maps_once_an_edit(sd: StableDiffusion, places: dict[str, Path]) -> None:
    engine, seen = _engine(sd, places, 3), []
    net = engine.networks["pose"]
    net.module.hint.embedding.register_forward_pre_hook(lambda _module, given: seen.append(len(given[0])))
    config = EditConfig(prompts=(PROMPT, "a dog"), steps=2, inversion_steps=1, controls=(Control(name="pose"),))
    editing.edit(engine, config, maps={"pose": _maps("pose", 3)})
    assert seen == [3], "three frames; not once more for a step, a prompt or guidance"


def test_an_adapter_in_a_single_file_says_what_to_give(sd: StableDiffusion, places: dict[str, Path]) -> None:
    file = next(places["depth"].glob("*.safetensors"))
    with pytest.raises(InputError, match="does not tell an adapter's kind: give a directory of diffusers"):
        load_networks(sd, {}, {"depth": file})


def test_memory_of_networks_is_counted(
    sd: StableDiffusion, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, nets = 3, _engine(sd, places, 3).networks
    total = []
    for one in (nets["pose"], nets["sketch"]):
        latents, text = torch.zeros(2, 4, frames, 8, 8), torch.zeros(2, 16, 32)
        made = one.following(torch.zeros(frames, 3, SIDE, SIDE), 1.0)(latents, torch.tensor(3), text)
        weights = sum(4 * p.numel() for p in one.module.parameters())
        found = network_bytes(one.module, frames, SIDE, SIDE, sd.vae_factor, rows=2)
        assert weights + 2 * sum(4 * x.numel() for x in made.values()) < found < 100 * 2**20
        total.append(found - weights)
    needed = eager.estimate_editing(sd, frames, SIDE, SIDE)
    loaded = sum(p.numel() * p.element_size() for part in (sd.unet, sd.vae, sd.text_encoder) for p in part.parameters())
    monkeypatch.setattr(eager, "free_bytes", lambda _device: needed - loaded + sum(total) - 1)
    eager.check_editing(sd, frames, SIDE, SIDE, networks=[nets["pose"].module])
    with pytest.raises(InputError, match="editing 3 frames of 64×64 by 2 networks that follow maps needs about"):
        eager.check_editing(sd, frames, SIDE, SIDE, networks=[nets["pose"].module, nets["sketch"].module])


def test_inversion_takes_conditions_only_where_it_is_told_to(sd: StableDiffusion, places: dict[str, Path]) -> None:
    engine = _engine(sd, places, 2)
    config = EditConfig(prompts=("a",), inversion_steps=2, controls=(Control(name="pose"),))
    following = editing.conditions(engine, config, {"pose": _maps("pose", 2)})
    without = editing.start_latents(engine, config)
    assert torch.equal(without, editing.start_latents(engine, config, following=following))
    with_them = editing.start_latents(engine, replace(config, control_inversion=True), following=following)
    assert (with_them - without).abs().max() > 1e-3


TOGETHER = EditConfig(
    prompts=(PROMPT,), steps=2, inversion_steps=1, controls=(Control(name="pose", scale=0.5), Control(name="depth"))
)
"""One of each kind."""


def _clip(frames: int) -> np.ndarray:
    return maps_of(frames, SIDE, SIDE, 11)


@torch.no_grad()
def test_a_long_clip_follows_its_maps_window_by_window(sd: StableDiffusion, places: dict[str, Path]) -> None:
    engine, total, window = _engine(sd, places, 3), 5, 3
    maps = {one.name: _maps(one.name, total) for one in TOGETHER.controls}
    latents = torch.randn(2, 4, total, 8, 8, generator=torch.Generator().manual_seed(2))
    text, timestep = engine.encode_text(["", PROMPT]), torch.tensor(301)
    following = editing.conditions(engine, TOGETHER, maps, total)
    long = editing.Calls(windows_at_once=2).predict(engine)
    found = condition.Conditioned(long, following, TOGETHER.steps)(latents, timestep, text)

    expected = torch.zeros_like(latents)
    for begin, share in zip(windows.begins(total, window), windows.weights(total, window), strict=True):
        own = [0, *range(begin + 1, begin + window)]
        acting = editing.conditions(engine, TOGETHER, {name: one[own] for name, one in maps.items()})
        told = condition.told(acting, latents[:, :, own], timestep, text)
        expected[:, :, own] += share[:, None, None].float() * engine.predict(latents[:, :, own], timestep, told)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found - long(latents, timestep, text)).abs().max() > 1e-2, "the maps do nothing"


def test_maps_are_of_the_source_that_is_edited(sd: StableDiffusion, places: dict[str, Path]) -> None:
    engine = _engine(sd, places, 2)
    config = replace(TOGETHER, controls=TOGETHER.controls[1:], control_inversion=True)
    found = editing.edit(engine, config, frames=_clip(4), maps={"depth": _maps("depth", 4)})
    assert found.shape == (1, 4, SIDE, SIDE, 3)
    with pytest.raises(InputError, match=r"control depth: its maps are uint8 \(2, 64, 64, 3\).* 4 frames of 64×64"):
        editing.edit(engine, config, frames=_clip(4), maps={"depth": _maps("depth", 2)})


def test_outside_a_mask_the_source_stays_whatever_is_followed(
    sd: StableDiffusion, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, frames, decoded = _engine(sd, places, 2), _clip(2), []
    decode = models.decode_video
    monkeypatch.setattr(models, "decode_video", lambda sd, latents: decoded.append(latents) or decode(sd, latents))
    mask = np.zeros((1, SIDE, SIDE), bool)
    mask[:, :, : SIDE // 2] = True
    maps = {one.name: _maps(one.name, 2) for one in TOGETHER.controls}
    editing.edit(engine, TOGETHER, frames=frames, mask=mask, maps=maps)
    editing.edit(engine, replace(TOGETHER, controls=()), frames=frames, mask=mask)
    followed, plain = decoded
    source, half = engine.encode_video(frames), followed.shape[4] // 2
    assert torch.equal(followed[..., half + 1 :], source[..., half + 1 :])
    assert (followed - plain)[..., : half - 1].abs().max() > 1e-2, "the maps do nothing"


CONTROL_OF_ATTENTION: dict[str, dict[str, Any]] = {
    "keep": {"keep": "background"},
    "words": {"word_weights": ("panda:2",)},
    "replaced": {"replace_self": 0.5},
    "blended": {"blend_words": ("panda",)},
}


@pytest.mark.parametrize("case", CONTROL_OF_ATTENTION)
def test_attention_control_and_maps_are_not_for_one_edit(
    sd: StableDiffusion, places: dict[str, Path], case: str
) -> None:
    config = replace(TOGETHER, inversion_steps=None, **CONTROL_OF_ATTENTION[case])
    maps = {one.name: _maps(one.name, 2) for one in config.controls}
    with pytest.raises(InputError, match=r"'pose' with attention control .* give one of them"):
        editing.edit(_engine(sd, places, 2), config, maps=maps)
