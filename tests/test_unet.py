"""Inflation against the reference's numbers, and its refusals."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.functional import mse_loss

from tav_opt.config import InputError
from tav_opt.models import load_video_unet
from tav_opt.unet import ClipGroupNorm, clip_value_names, inflate, trained_names

PAPER = ("attn1.to_q", "attn2.to_q", "attn_temp")
TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}


def tiny(**settings: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**TINY, **settings})


@pytest.mark.parametrize("case", range(4))
def test_forward_equals_the_reference(golden, tensors, case):
    unet = load_video_unet(golden / "unet_sd1" / "unet3d")
    with torch.no_grad():
        noise = unet(*(tensors[f"forward{case}.{name}"] for name in ("sample", "timestep", "text")))
    error = (noise - tensors[f"forward{case}.output"]).abs().max().item()
    assert error < 1e-5, f"case {case}: largest absolute error {error:.1e}"


def test_the_reference_trains_the_same_parameters(golden):
    unet = load_video_unet(golden / "unet_sd1" / "unet3d")
    assert sorted(trained_names(unet, PAPER)) == sorted((golden / "unet_sd1" / "trainable.txt").read_text().split())


@pytest.mark.parametrize("kind", ["sd", "tuned"])
def test_both_directories_of_the_reference_load(golden, kind):
    unet = load_video_unet(golden / "reference_checkpoint" / kind)
    assert unet(torch.randn(1, 4, 3, 8, 8), torch.tensor([5]), torch.randn(1, 16, 32)).shape == (1, 4, 3, 8, 8)


def test_one_frame_at_first_is_the_image_model_but_for_temporal_bias():
    """A clip of one frame attends to itself alone: without attn_temp's bias it is the image UNet."""
    image = tiny().eval()
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 12)
    with torch.no_grad():
        expected = image(x, t, text).sample
        video = inflate(image)
        for name, value in video.named_parameters():
            if name.endswith("attn_temp.to_out.0.bias"):
                value.zero_()
        assert (video(x[:, :, None], t, text)[:, :, 0] - expected).abs().max() < 1e-5


def test_gradient_checkpointing_changes_no_gradient(golden, tensors):
    unet = load_video_unet(golden / "unet_sd1" / "unet3d").train()
    names = trained_names(unet, PAPER)
    parameters = [p.requires_grad_() for name, p in unet.named_parameters() if name in names]
    inputs = [tensors[f"forward0.{name}"] for name in ("sample", "timestep", "text")]
    plain = torch.autograd.grad(mse_loss(unet(*inputs), tensors["forward0.output"] + 1), parameters)
    unet.enable_gradient_checkpointing()
    again = torch.autograd.grad(mse_loss(unet(*inputs), tensors["forward0.output"] + 1), parameters)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(plain, again, strict=True))
    assert any(g.abs().max() > 0 for g in again)


@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_a_clips_norm_is_one_group_norm_over_its_frames_in_any_layout(last):
    """Against the definition in float64: mean and variance over a group's channels, all frames and pixels."""
    torch.manual_seed(0)
    norm = ClipGroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(6, 8, 5, 4) * 3 + 1  # two clips of 3 frames
    given = x.contiguous(memory_format=torch.channels_last) if last else x
    groups = x.double().view(2, 3, 4, 2, 20).transpose(1, 2).flatten(2)  # b, groups, f · c/groups · h w
    centred = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    truth = centred.view(2, 4, 3, 2, 20).transpose(1, 2).reshape(6, 8, 5, 4)
    truth = truth * norm.weight.double().view(-1, 1, 1) + norm.bias.double().view(-1, 1, 1)
    found = norm.over(given, 3)
    torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_channels_come_last_from_the_first_convolution_to_the_last_norm(golden):
    unet = load_video_unet(golden / "reference_checkpoint" / "sd")
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in unet.parameters() if p.ndim == 4)
    seen = []
    unet.conv_norm_out.register_forward_hook(lambda _module, given, _found: seen.append(given[0]))
    unet(torch.randn(1, 4, 3, 8, 8), torch.tensor([5]), torch.randn(1, 16, 32))
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()


def test_clips_of_a_batch_do_not_see_each_other(golden, tensors):
    unet = load_video_unet(golden / "unet_sd1" / "unet3d")
    x, t, text = (tensors[f"forward1.{name}"] for name in ("sample", "timestep", "text"))
    with torch.no_grad():
        both = unet(x, t, text)
        one = unet(x[1:], t[1:], text[1:])
    assert (both[1:] - one).abs().max() < 1e-5


def test_clip_values_are_what_trained_and_what_the_image_model_lacks():
    names = clip_value_names(inflate(tiny()), ("attn1.to_q",))
    assert names and all("attn1.to_q" in n or "attn_temp" in n or "norm_temp" in n for n in names)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"encoder_hid_dim": 7, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D")}, "ResnetDownsampleBlock2D"),
    ],
)
def test_other_unets_are_refused_by_name(settings, word):
    with pytest.raises(InputError, match=word):
        inflate(tiny(**settings))


def test_an_unknown_trainable_is_named():
    with pytest.raises(InputError, match="attn9"):
        trained_names(inflate(tiny()), ("attn9",))
