"""The transposed convolution in place of upsampling and convolution: diffusers' own is the truth."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from tav_opt.upsampling import FusedUpsample, fuse


def pair(channels: int = 6, out: int = 10, **settings: object) -> tuple[Upsample2D, Upsample2D]:
    """diffusers' module and the same one swapped, with the same parameters in float64."""
    torch.manual_seed(0)
    theirs = Upsample2D(channels, use_conv=True, out_channels=out, **settings).double()
    ours = Upsample2D(channels, use_conv=True, out_channels=out, **settings).double()
    ours.load_state_dict(theirs.state_dict())
    fuse(ours)
    assert type(ours) is FusedUpsample
    return theirs, ours


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3), (8, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_diffusers(size, layout):
    theirs, ours = pair()
    x = torch.randn(3, 6, *size, dtype=torch.float64).to(memory_format=layout)
    results = []
    for module in (theirs, ours):
        given = x.clone().requires_grad_()
        y = module(given)
        y.square().sum().backward()
        results.append((y, given.grad, module.conv.weight.grad, module.conv.bias.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(10, 6), (9, 5), (10, 5), (12, 7)])
def test_sizes_that_are_not_twice_as_large_too(size):
    theirs, ours = pair()
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x, size), theirs(x, size), rtol=1e-10, atol=1e-10)


def test_a_layer_around_the_convolution_is_called():
    """PEFT puts its own in the convolution's place; its `weight` is that of the base alone."""

    class Around(nn.Module):
        def __init__(self, conv: nn.Conv2d) -> None:
            super().__init__()
            self.conv, self.weight, self.bias = conv, conv.weight, conv.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + 1

    theirs, ours = pair()
    ours.conv = Around(ours.conv)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x) + 1, rtol=1e-10, atol=1e-10)


def test_upsampling_without_a_convolution_behind_it_stays_diffusers():
    for settings in ({}, {"use_conv_transpose": True}):
        module = Upsample2D(6, **settings)
        fuse(module)
        assert type(module) is Upsample2D


@pytest.mark.parametrize("kernel, padding", [(1, 0), (5, 2)])
def test_other_kernels_are_left_as_they_are(kernel, padding):
    theirs, ours = pair(kernel_size=kernel, padding=padding)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
