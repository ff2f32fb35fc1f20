"""Feature reuse: the outermost layers of the UNet on what came to them from below at another step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from exported import STEPS, Exported, export_once, open_base
from fakes import FakeEngine, answered, editor
from torch import Tensor

from tav_opt import cli, ddim, editing, outermost, video
from tav_opt.config import Control, EditConfig, InputError
from tav_opt.contract import to_tensors
from tav_opt.engines import onnxruntime
from tav_opt.engines.exported import ExportedEngine
from tav_opt.engines.pytorch import TorchEngine, open_checkpoint
from tav_opt.export import __main__ as command
from tav_opt.export import half_graph, parity
from tav_opt.files import read_json
from tav_opt.reuse import FEATURES, Reused
from tav_opt.unet import VideoUNet, inflate

SCHEDULE = ddim.Schedule.from_config({})
CHEAP = EditConfig(prompts=("a cat",), steps=12, guidance_scale=3.0, reuse_interval=3)


def _unet(side: int = 8, layers: int = 2, **settings: object) -> tuple[VideoUNet, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(layers)
    image = UNet2DConditionModel(
        sample_size=side, block_out_channels=(32, 64), cross_attention_dim=16, attention_head_dim=4,
        layers_per_block=layers, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **settings,
    )  # fmt: skip
    unet = inflate(image).eval().requires_grad_(False)
    for name, value in unet.named_parameters():
        if name.endswith("attn_temp.to_out.0.weight"):
            value.normal_(std=0.1)
    return unet, (torch.randn(2, 4, 3, side, side), torch.tensor([500, 301]), torch.randn(2, 5, 16))


@pytest.mark.parametrize("side, layers, settings", [(8, 1, {}), (8, 2, {}), (7, 2, {"center_input_sample": True})])
def test_the_whole_network_is_the_plain_one_bit_for_bit(side: int, layers: int, settings: dict[str, object]) -> None:
    unet, inputs = _unet(side, layers, **settings)
    noise, features = unet(*inputs, gives_features=True)
    assert torch.equal(noise, unet(*inputs))
    assert features.shape == (2, 3, outermost.channels(unet), side, side)
    assert torch.equal(unet(*inputs, features=features), noise)


def test_the_outermost_layers_are_those_of_the_plain_network_on_what_came_from_below() -> None:
    """By hooks on diffusers' own forward: another input goes in, and what comes from below is put in its place."""
    unet, (latents, timesteps, text) = _unet()
    _, features = unet(latents, timesteps, text, gives_features=True)
    last = unet.up_blocks[-1]
    first = last.resnets[len(last.resnets) - outermost.LAYERS]

    def from_below(_: object, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = given
        return torch.cat([features.flatten(0, 1), x[:, features.shape[2] :]], 1), *rest

    other = latents + 0.3 * torch.randn_like(latents)
    hook = first.register_forward_pre_hook(from_below)
    expected = unet(other, timesteps - 50, text)
    hook.remove()
    assert (expected - unet(other, timesteps - 50, text)).abs().max() > 1e-3
    assert torch.equal(unet(other, timesteps - 50, text, features=features), expected)


class Asked:
    """A network that counts: which calls were whole, of how many rows; features tell of the step and the row."""

    def __init__(self) -> None:
        self.whole: list[tuple[int, int]] = []
        self.told: list[tuple[int, Tensor]] = []

    def predict(self, latents: Tensor, timestep: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        assert set(text) == {"text", FEATURES} and len(text[FEATURES]) == len(latents)
        self.told.append((int(timestep), text[FEATURES][:, 0, 0, 0, 0]))
        return 0.1 * latents

    def with_features(self, latents: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        self.whole.append((int(timestep), len(latents)))
        rows = int(timestep) + text[:, 0, 0] / 10 + latents[:, 0, 0, 0, 0] * 0
        return 0.1 * latents, rows.view(-1, 1, 1, 1, 1).expand(-1, latents.shape[2], 1, 2, 2)


def _run(asked: Asked, interval: int, guidance_interval: int = 1, prompts: int = 1) -> list[int]:
    reused = Reused(asked.predict, asked.with_features, interval, 10)
    text = torch.arange(1, prompts + 1).view(-1, 1, 1).float()
    ddim.sample(
        reused.stepwise(reused), torch.ones(prompts, 1, 2, 2, 2), text, SCHEDULE, 10,
        unconditional=torch.zeros_like(text), guidance_scale=2.0, guidance_interval=guidance_interval,
    )  # fmt: skip
    return SCHEDULE.timesteps(10)


def test_the_whole_network_runs_in_the_first_fifth_and_then_now_and_then() -> None:
    asked = Asked()
    timesteps = _run(asked, 3)
    assert [t for t, _ in asked.whole] == [timesteps[number] for number in (0, 1, 3, 6, 9)]
    assert len(asked.told) == 5
    for timestep, rows in asked.told:
        last = min(t for t, _ in asked.whole if t > timestep)
        assert torch.allclose(rows, last + torch.tensor([0.0, 0.1])), "features of the last whole step, row by row"


def test_the_texts_half_of_the_features_serves_a_step_without_guidance() -> None:
    asked = Asked()
    timesteps = _run(asked, 2, guidance_interval=4, prompts=2)
    assert asked.whole == [(timesteps[n], 4 if n in (0, 1, 4, 8) else 2) for n in (0, 1, 2, 4, 6, 8)]
    without = [rows - rows.round() for _, rows in asked.told]
    assert all(torch.allclose(rows, torch.tensor([0.1, 0.2]), atol=1e-3) for rows in without)


def test_a_guided_step_computes_what_the_last_whole_one_did_not() -> None:
    asked = Asked()
    timesteps = _run(asked, 3, guidance_interval=4)
    assert asked.whole == [(timesteps[n], 2 if n in (0, 1, 4, 8) else 1) for n in (0, 1, 3, 4, 6, 8, 9)]


@pytest.fixture(scope="module")
def eager(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    return open_checkpoint(export_once(golden, tmp_path_factory.getbasetemp()).checkpoint)


def test_the_whole_network_at_every_step_is_the_exact_edit_bit_for_bit(eager: TorchEngine) -> None:
    exact = replace(CHEAP, reuse_interval=1, steps=STEPS)
    text, start = editing.encode_prompts(eager, exact), editing.start_latents(eager, exact)
    plain, kept = (
        next(editing.sample(eager, replace(exact, reuse_interval=interval), text, start)) for interval in (1, 1000)
    )
    always = Reused(eager.predict, eager.predict_with_features, 1, STEPS)
    found = ddim.sample(
        always.stepwise(always), start, text[1:], eager.schedule, STEPS, unconditional=text[:1], guidance_scale=3.0
    )
    assert torch.equal(found, plain) and not torch.equal(kept, plain)


def test_windows_keep_features_of_their_own(eager: TorchEngine) -> None:
    """A clip of three windows: each is told what came from below of itself, one at a time or all at once."""
    frames = np.random.default_rng(4).integers(0, 256, (7, 64, 64, 3), dtype=np.uint8)
    config = replace(CHEAP, inversion_steps=2, guidance_interval=2)
    alone, together = (editing.edit(eager, config, frames=frames, windows_at_once=number) for number in (1, 3))
    assert alone.shape[1] == 7 and np.abs(alone.astype(int) - together).max() <= 2


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"keep": "motion"}, "reuse interval 3 with attention control: .* must be 1"),
        ({"controls": (Control(name="pose"),)}, "reuse interval 3 with controls"),
        ({"reuse_interval": 0}, "reuse interval 0 is not within 1…1000"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        editing.check(replace(CHEAP, **settings))
    with pytest.raises(InputError, match=r"no such UNet: reuse interval needs .* --feature-reuse"):
        answered(editor(FakeEngine()), to_tensors("toy", CHEAP))


@pytest.fixture(scope="module")
def reusable(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The first clip once more, on its base with the two graphs."""
    found = export_once(golden, tmp_path_factory.getbasetemp())
    arguments = [str(found.checkpoint), "--repository", str(found.repository), "--name", "first", "--feature-reuse"]
    assert command.main(arguments) == 0
    return found


@pytest.mark.full
def test_two_graphs_over_the_bases_own_weights(reusable: Exported) -> None:
    added = read_json(reusable.base / "manifest.json")["added"]
    assert set(added) == {"unet_whole", "unet_outermost"}
    for name, told in added.items():
        assert told["parity"]["error"] <= parity.TOLERANCES["unet"].error
        assert {*told["files"]} == {f"{name}.onnx"}, "weights of its own"


@pytest.mark.full
@pytest.mark.parametrize("engine", ["onnxruntime", "pytorch"])
def test_an_edit_is_that_of_eager_pytorch(reusable: Exported, eager: TorchEngine, engine: str) -> None:
    clip = ExportedEngine.open(reusable.version / "clips" / "first", open_base(reusable, engine))
    config = replace(CHEAP, guidance_interval=2)
    expected, found = (editing.edit(one, config) for one in (eager, clip))
    assert np.abs(expected.astype(int) - found).max() <= 2
    plain = editing.edit(clip, replace(config, reuse_interval=1))
    assert np.abs(plain.astype(int) - found).max() > 2
    if engine == "onnxruntime":
        plain_bytes, needed = clip.extra_bytes(1), clip.extra_bytes(1, told=("text", FEATURES))
        assert needed > plain_bytes + 4 * outermost.channels(eager.sd.unet) * 4 * 8 * 8


@pytest.mark.full
def test_the_server_and_the_command_reuse_features_and_say_so(reusable: Exported, tmp_path: Path) -> None:
    clip = ExportedEngine.open(reusable.version / "clips" / "first", open_base(reusable, "onnxruntime"))
    expected = editing.edit(clip, CHEAP)
    responses, report = answered(editor(clip), to_tensors("first", CHEAP))
    assert np.array_equal(responses[-1]["frames"], expected)
    assert json.loads(responses[-1]["metadata"][0])["reuse_interval"] == 3
    assert "reuse_interval=3" in report.line(prompts=False)
    asked = ["edit", str(reusable.version / "clips" / "first"), "--prompt", "a cat", "--steps", "12", "--guidance", "3"]
    assert cli.main([*asked, "--reuse-interval", "3", "--out", str(tmp_path / "frames")]) == 0
    assert np.array_equal(video.read(tmp_path / "frames").frames, expected[0])


@pytest.mark.full
def test_features_go_from_graph_to_graph_without_a_copy(reusable: Exported) -> None:
    clip = ExportedEngine.open(reusable.version / "clips" / "first", open_base(reusable, "onnxruntime"))
    _, features = clip.predict_with_features(clip.inverted_latents, 301, clip.encode_text("a cat"))
    assert features.is_contiguous() and features.contiguous().data_ptr() == features.data_ptr()


@pytest.mark.full
def test_edits_of_one_batch_share_calls_of_the_same_kind(reusable: Exported) -> None:
    from tav_opt.serving.batching import _alike, _Call, _together

    clip = ExportedEngine.open(reusable.version / "clips" / "first", open_base(reusable, "onnxruntime"))
    latents, text = clip.inverted_latents, clip.encode_text(["a cat", "a dog"])
    calls = [_Call(latents + i, torch.tensor(301), text[i : i + 1], "predict_with_features") for i in range(2)]
    found = _together(clip, calls)
    for call, (noise, features) in zip(calls, found, strict=True):
        alone = clip.predict_with_features(call.latents, call.timestep, call.text)
        for one, other in zip((noise, features), alone, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    told = _Call(latents, torch.tensor(301), {"text": text[:1], FEATURES: found[0][1]})
    plain = _Call(latents, torch.tensor(301), text[:1])
    assert [len(group) for group in _alike([*calls, told, plain])] == [2, 1, 1]


@pytest.mark.full
def test_a_base_with_them_has_them_in_fp16_too(reusable: Exported) -> None:
    half_graph.export(reusable.version / "clips" / "first")
    folder = onnxruntime.half_folder(reusable.base)
    assert {*read_json(folder / "manifest.json")["added"]} == {"unet_whole", "unet_outermost"}
