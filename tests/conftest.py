"""What the tests of several rooms need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before a test imports onnxruntime
SHARED = Path(os.environ.get("TAV_OPT_TESTS_SHARED") or Path(__file__).parents[2] / "shared")
"""Beside the checkout, unless the variable names another folder."""


@pytest.fixture(scope="session")
def shared() -> Path:
    """Golden data and real clips, which are not part of a clone."""
    if not SHARED.is_dir():
        pytest.skip(f"the folder {SHARED} with golden data and real clips is absent")
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


@pytest.fixture(scope="session")
def shallow(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of the tests' one export."""
    from exported import common, shallow_base

    return shallow_base(golden, common(tmp_path_factory.getbasetemp()))


@pytest.fixture
def small(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a suite of one video of noise, `dog`, beside it; keys may be given."""
    from suites import entry, random_video, settings, written

    random_video(tmp_path / "dog.mp4")

    def write(**more: Any) -> Path:
        model = golden / "reference_checkpoint" / "sd"
        return written(tmp_path, settings(model, videos=[entry("dog.mp4")]) | more)

    return write


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright; closed after each module, since an event loop of its own runs meanwhile."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens pages as raters of browsers of their own; nothing may go wrong in them unseen."""
    contexts, faults = [], []

    def open_page(url: str) -> Any:
        contexts.append(browser.new_context(viewport={"width": 1000, "height": 900}, accept_downloads=True))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults, faults


@pytest.fixture(scope="session")
def evaluated(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of an evaluation of finished videos: two videos of two edits each, by `ours`, `other` and `third`."""
    from suites import FRAMES, entry, random_video, settings, written

    from tav_opt import cli

    folder = tmp_path_factory.mktemp("evaluated")
    edits = [{"prompt": "a cat", "name": "cat", "category": "subject"}]
    edits += [{"prompt": 'a "dog" <b>&', "name": "dog", "category": "style"}]
    videos, methods = ("one", "two"), ("ours", "other", "third")
    for seed, name in enumerate(videos):
        random_video(folder / f"{name}.mp4", seed=seed)
        for method in methods:
            (folder / method / name).mkdir(parents=True)
            for edit in ("cat", "dog"):
                random_video(folder / method / name / f"{edit}.mp4", FRAMES, seed=len(list(folder.rglob("*"))))
    entries = [entry(f"{name}.mp4", edits=edits) for name in videos]
    model = golden / "reference_checkpoint" / "sd"
    suite = written(folder, settings(model, videos=entries, methods={name: {"folder": name} for name in methods}))
    assert cli.main(["evaluate", str(suite), "--out", str(folder / "run")]) == 0
    return folder / "run"


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
