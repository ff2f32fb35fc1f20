"""What the tests of several rooms need."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before a test imports onnxruntime
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden data and real clips, which are not part of a clone."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with golden data and real clips is absent")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Numbers of the reference implementation."""
    return shared / "golden"


@pytest.fixture(scope="session")
def tensors(golden: Path) -> dict[str, torch.Tensor]:
    """Inputs and outputs of the reference's small UNet."""
    from safetensors.torch import load_file

    return load_file(golden / "unet_sd1" / "tensors.safetensors")


@pytest.fixture
def small(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a suite of one video of noise, `dog`, beside it; keys may be given."""
    from suites import entry, random_video, settings, written

    random_video(tmp_path / "dog.mp4")

    def write(**more: Any) -> Path:
        model = golden / "reference_checkpoint" / "sd"
        return written(tmp_path, settings(model, videos=[entry("dog.mp4")]) | more)

    return write


@pytest.fixture(scope="session", autouse=True)
def no_proxy_to_this_machine() -> Iterator[None]:
    """For the connections of the tests themselves; those of the product are test_serving_surroundings'."""
    loopback = "localhost,127.0.0.1,::1"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, ",".join(filter(None, (os.environ.get(name), loopback))))
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers that tests start keep inversions there, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
