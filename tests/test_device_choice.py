"""Which device and precision `auto` means, said at the start of a command."""

from __future__ import annotations

import pytest
import torch

from tav_opt import device
from tav_opt.config import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")


def test_auto_is_a_gpu_in_float16_where_there_is_one(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "empty", lambda _, device: asked.append(device) or torch.zeros(1))
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device.usable_device("auto") == torch.device(expected) == asked[-1]
    assert device.dtype_on(CUDA) == torch.float16 and device.dtype_on(CPU) == torch.float32
    assert device.dtype_on(CUDA, torch.bfloat16) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"Card {place.index}")
    assert device.told(CUDA, torch.float16) == "cuda:1 (Card 1) in float16"
    assert device.told(CPU, torch.float32) == "cpu in float32"


def test_a_gpu_that_is_seen_and_cannot_be_used_is_an_error(monkeypatch):
    """Not a silent processor."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if torch.cuda.device_count():
        pytest.skip("the GPU of this machine can be used")
    with pytest.raises(InputError, match="device 'cuda' cannot be used; cpu can"):
        device.usable_device("auto")
