"""The page of `tav-opt app` in a real browser, over the real server: what people do with it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import DESKTOP, PHONE, Tab, behind_proxy, chromium, dropped_video
from exported import FRAMES, SIDE, Exported, export_once
from PIL import Image
from served import serving, until

from tav_opt import video
from tav_opt.client import Client, Edit
from tav_opt.config import EditConfig, InputError, WorkerConfig
from tav_opt.serving.host.server import Server

pytest.importorskip("gradio", reason="Gradio is not installed (extra app)")

from tav_opt.app.app_config import AppConfig
from tav_opt.app.backends import names
from tav_opt.app.page import Page

PROMPT = "a panda is on the beach"


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def server(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    repository = Path(shutil.copytree(exported.repository, folder / "repository"))
    with serving(repository, WorkerConfig(cache=folder / "cache")) as running:
        yield running


@pytest.fixture(scope="module")
def url(server: Server, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page over that server, on which the small model can be tuned."""
    config = AppConfig(
        url=server.grpc_url,
        metrics_url=server.metrics_url,
        repository=server.config.repository,
        models=str(golden / "reference_checkpoint" / "sd"),
        folder=tmp_path_factory.mktemp("app") / "out",
        port=0,
    )
    with Page(config).opened() as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Tab]:
    tab = Tab(browser, url, **DESKTOP)
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dropped_video(tmp_path_factory.mktemp("dropped"))


def assert_same(shown: np.ndarray, edit: Edit) -> None:
    """Frames of an MP4, and those that an edit would have in one."""
    expected = video.decode(video.encode_mp4(edit.frames[0], edit.fps)).frames
    assert np.abs(shown.astype(int) - expected).mean() < 1 and expected.std() > 10


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_an_edit_with_previews_is_the_servers_own_and_can_be_saved(browser, url, server, size):
    tab = Tab(browser, url, **size)
    assert "source: a panda is skiing" in tab.text("stage") and tab.fits()
    tab.advanced(steps=12, guidance_scale=7.5)
    tab.edit(PROMPT)
    tab.page.wait_for_selector("#stage .tav-preview img")
    tab.until_edited()
    assert tab.fits() and "12 steps, guidance 7.5, ddim" in tab.text("status")
    shown = video.read(tab.saved("mp4")).frames
    with Client(server.grpc_url) as client:
        edit = client.edit("first", EditConfig(prompts=(PROMPT,), steps=12, guidance_scale=7.5))
    assert_same(shown, edit)
    assert video.settings_of(tab.saved("gif"))["steps"] == 12
    assert video.settings_of(tab.saved("png"))["steps"] == 12
    tab.page.click(".tav-toggle")
    wipe = tab.page.locator(".tav-wipe")
    wipe.focus()
    wipe.press("ArrowLeft")
    assert tab.page.evaluate("document.querySelector('.tav-player').style.getPropertyValue('--wipe')") == "49%"
    tab.page.click(".tav-play")
    tab.wait("[...document.querySelectorAll('#stage video')].every(v => v.paused)")
    times = "[...document.querySelectorAll('#stage video')].map(v => v.currentTime)"
    tab.wait(f"Math.max(...{times}) - Math.min(...{times}) <= 0.05")  # a frame, as the page has it
    tab.close()


def test_cancel_stops_the_edit_on_the_server(tab, server):
    server.log.clear()
    tab.advanced(steps=1000)
    tab.edit(PROMPT)
    tab.wait("/step \\d+ of 1000/.test(document.querySelector('#status').innerText)")
    status = tab.text("status")
    assert "left" in status or "step 1 " in status
    tab.page.click("#cancel")
    tab.wait("document.querySelector('#status').innerText.includes('Cancelled')")
    until(lambda: any("CANCELLED" in line for line in list(server.log)))
    tab.advanced(steps=2)
    tab.edit(PROMPT)
    tab.until_edited()


def test_a_closed_page_cancels_too(browser, url, server):
    server.log.clear()
    tab = Tab(browser, url, **DESKTOP)
    tab.advanced(steps=1000)
    tab.edit(PROMPT)
    tab.wait("/step \\d+ of 1000/.test(document.querySelector('#status').innerText)")
    tab.close()
    until(lambda: any("CANCELLED" in line for line in list(server.log)))


def test_what_is_refused_is_told_in_place_in_the_servers_words(tab, server):
    for settings, prompts in (({"steps": 0}, PROMPT), ({"steps": 3}, "word " * 200)):
        tab.advanced(**settings)
        tab.edit(prompts)
        tab.page.wait_for_selector("#failure [role=alert]")
        with Client(server.grpc_url) as client, pytest.raises(InputError) as refused:
            client.edit("first", EditConfig(prompts=(prompts.strip(),), **settings))
        tab.wait(f"document.querySelector('#failure').innerText.trim() == {json.dumps(str(refused.value))}")
    tab.advanced(steps=2.5)
    tab.edit(PROMPT)
    tab.wait("document.querySelector('#failure').innerText.includes('is no whole number')")
    assert not tab.page.locator(".toast-body").count(), "an error stands in its place, not over the page"


def test_edits_are_remembered_compared_and_made_again(tab):
    tab.advanced(steps=2, seed=7)
    tab.edit(f"{PROMPT}\na cat is skiing")
    tab.until_edited()
    assert tab.page.locator("#which input").count() == 2
    tab.page.locator("#history input").nth(1).wait_for()
    tab.page.reload()
    tab.page.locator("#history input").nth(1).wait_for()
    assert "a cat is skiing" in tab.text("history") and "seed 7" in tab.text("history")
    for number in (0, 1):
        tab.page.locator("#history input").nth(number).check()
    tab.page.click("#compare")
    tab.until_two()
    assert {"a cat is skiing", PROMPT} == {
        text.strip() for text in tab.page.locator("#stage .tav-tag").all_inner_texts()
    }
    tab.page.locator("#history input").nth(1).uncheck()
    tab.page.click("#again")
    tab.wait("document.querySelector('#prompts textarea').value == 'a cat is skiing'")
    tab.advanced()
    assert tab.field("set-seed").input_value() == "7"
    assert tab.field("set-eta").input_value() == ""


def test_a_video_that_is_dropped_in_takes_the_clips_place_within_a_mask(tab, server, dropped, tmp_path):
    half = np.zeros((10, 10), np.uint8)
    half[:, 5:] = 255
    Image.fromarray(half).save(mask := tmp_path / "half.png")
    tab.page.get_by_text("Another video in its place").click()
    tab.page.set_input_files("#edit-video input[type=file]", dropped)
    tab.page.wait_for_selector("#edit-video video")
    tab.page.get_by_text("Mask, and maps to follow").click()
    tab.page.set_input_files("#mask input[type=file]", mask)
    tab.page.get_by_text("half.png").wait_for()
    tab.advanced(steps=2)
    tab.edit(PROMPT)
    tab.until_edited()
    shown = video.read(tab.saved("mp4")).frames
    with Client(server.grpc_url) as client:
        asked = EditConfig(prompts=(PROMPT,), steps=2)
        edit = client.edit("first", asked, video=dropped, mask=mask, left_out={"guidance_scale"})
    assert edit.metadata[0]["masked"]
    assert_same(shown, edit)


def test_who_waits_sees_a_place_in_the_queue(browser, url, tab):
    tab.advanced(steps=1000)
    tab.edit(PROMPT)
    tab.wait("/step \\d+ of 1000/.test(document.querySelector('#status').innerText)")
    second = Tab(browser, url, **DESKTOP)
    second.advanced(steps=2)
    second.edit("a cat is skiing")
    second.wait("/queue: \\d/.test(document.body.innerText)")
    tab.page.click("#cancel")
    second.until_edited()
    second.close()


def test_it_is_used_by_the_keyboard_in_the_dark_and_in_the_light(browser, url):
    shades = []
    for scheme in ("light", "dark"):
        tab = Tab(browser, url, color_scheme=scheme, **DESKTOP)
        tab.advanced(steps=2)
        tab.page.focus("#prompts textarea")
        tab.page.keyboard.type(PROMPT)
        for _ in range(30):
            tab.page.keyboard.press("Tab")
            if tab.page.evaluate("document.activeElement.id == 'edit'"):
                break
        tab.page.keyboard.press("Enter")
        tab.until_edited()
        shades.append(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        tab.close()
    light, dark = (sum(map(int, shade[4:-1].split(","))) for shade in shades)
    assert dark < 200 < 600 < light, shades


def test_clips_and_the_servers_health_are_told(tab):
    tab.page.get_by_role("tab", name="Clips and server").click()
    tab.wait("document.querySelector('#health').innerText.includes('alive')")
    assert "first" in tab.text("clips") and f"{SIDE}×{SIDE}" in tab.text("clips")


def test_the_clips_that_are_offered_are_the_servers_whatever_lies_here(server, tmp_path):
    (tmp_path / "tune_a_video_stream" / "1").mkdir(parents=True)
    config = AppConfig(url=server.grpc_url, repository=tmp_path)
    assert names(config) == ["first"] and names(replace(config, url="localhost:9")) == []


def test_behind_a_proxy_it_works_under_the_proxys_path(browser, exported, tmp_path):
    worker = WorkerConfig(cache=tmp_path / "cache")
    folder = tmp_path / "out"
    config = AppConfig(
        in_process=True, repository=exported.repository, folder=folder, port=0, root_path="/tav-opt", worker=worker
    )
    with Page(config).opened() as address, behind_proxy("/tav-opt", address.removesuffix("/tav-opt")) as shown:
        tab = Tab(browser, shown, **DESKTOP)
        tab.wait("document.querySelector('#stage video').readyState >= 2")
        tab.advanced(steps=2)
        tab.edit(PROMPT)
        tab.until_edited()
        assert video.settings_of(tab.saved("gif"))["steps"] == 2
        tab.close()


def prepared(tab: Tab, video: Path, caption: str) -> None:
    """A video is dropped in on the second tab; what is taken of it, and the memory that takes, are seen."""
    tab.page.get_by_role("tab", name="Tune").click()
    tab.set("caption", caption)
    tab.page.set_input_files("#tune-video input[type=file]", video)
    for name, value in {"frames": FRAMES, "height": SIDE, "width": SIDE}.items():
        tab.set(f"clip-{name}", value)
    tab.wait(f"document.querySelectorAll('#frames img').length == {FRAMES}")
    tab.page.get_by_text(f"Tuning {FRAMES} frames of {SIDE}×{SIDE} needs").wait_for()
    assert tab.page.locator("#frames img").first.is_visible()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_what_tuning_takes_is_seen_before_it_starts(browser, url, dropped, size):
    tab = Tab(browser, url, **size)
    prepared(tab, dropped, "squares of noise")
    assert tab.fits()
    tab.set("train-preview_every", 30)
    tab.page.click("#tune")
    tab.page.get_by_text("preview_every 30 needs preview_prompts").wait_for()
    tab.page.click("#export")
    tab.page.get_by_text("Choose a run that is done.").wait_for()
    tab.close()


@pytest.mark.full
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_clip_is_tuned_stopped_gone_on_with_exported_and_edited(browser, url, dropped, size):
    tab, name = Tab(browser, url, **size), f"noise-{size['viewport']['width']}"
    prepared(tab, dropped, "squares of noise")
    tab.wait("document.querySelector('#run-name input, #run-name textarea').value.startsWith('dropped')")
    tab.set("run-name", name)
    for setting, value in {"steps": 60, "preview_every": 30, "preview_prompts": "a cat"}.items():
        tab.set(f"train-{setting}", value)
    tab.page.get_by_text("Advanced").nth(1).click()
    tab.set("train-inversion_steps", 2)
    tab.page.click("#tune")
    tab.page.get_by_text(re.compile(r"tuning: step [1-9]\d* of 60")).wait_for()
    tab.page.click("#tune-stop")
    tab.page.get_by_text("Stopped after step").wait_for()
    tab.page.click("#go-on")
    tab.page.get_by_text("Export it to edit it.").wait_for()
    tab.page.wait_for_selector("#previews img")
    tab.page.wait_for_selector("#loss canvas, #loss svg")
    assert tab.fits()
    tab.page.click("#export")
    tab.page.get_by_text(f"{name} is exported").wait_for()
    tab.page.get_by_role("tab", name="Edit").click()
    tab.wait(f"document.querySelector('#clip input').value == '{name}'")
    tab.advanced(steps=2)
    tab.edit(PROMPT)
    tab.until_edited()
    tab.close()
