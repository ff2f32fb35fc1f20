"""The page of `tav-opt app`: its parts, and how it is opened; test_app_browser.py uses it."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tomllib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.cookiejar import CookieJar
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import emoji
import numpy as np
import pytest
from browser import dropped_video
from exported import FRAMES, Exported, export_once
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from served import until

from tav_opt import cli, editing, video
from tav_opt.client import Edit, Progress, ServerError
from tav_opt.config import EditConfig, InputError, TrainConfig, Within, WorkerConfig
from tav_opt.contract import STREAM_INPUTS
from tav_opt.engines.registry import open_clip
from tav_opt.video import Clip

pytest.importorskip("gradio", reason="Gradio is not installed (extra app)")

from tav_opt.app import controls, edit_history, markup
from tav_opt.app.app_config import AppConfig
from tav_opt.app.backends import InProcess, _Local
from tav_opt.app.edit_job import EditJob, EditJobs, Told
from tav_opt.app.kept_results import KeptResults
from tav_opt.app.page import Page
from tav_opt.app.tuning_runs import TuningRuns

PROMPT = "a panda is on the beach"


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dropped_video(tmp_path_factory.mktemp("dropped"))


# Controls.


def test_every_input_of_the_contract_is_on_the_page_or_told_to_be_missing():
    shown = {setting.name for setting in controls.of_an_edit()}
    assert shown | set(controls.ELSEWHERE) | set(controls.unshown()) == {tensor.name for tensor in STREAM_INPUTS}
    assert {"steps", "guidance_scale", "solver", "inversion", "fps", "prompt_metadata"} <= shown
    arrays = {tensor.name for tensor in STREAM_INPUTS if len(tensor.shape) > 1}
    assert set(controls.unshown()) <= arrays


def test_a_new_setting_appears_by_itself(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Edit(EditConfig):
        warmth: float = 0.5
        mood: Literal["calm", "wild"] = "calm"

    new = [replace(STREAM_INPUTS[3], name=name, doc=f"{name} of the picture") for name in ("warmth", "mood")]
    monkeypatch.setattr(controls, "EditConfig", Edit)
    monkeypatch.setattr(controls, "STREAM_INPUTS", (*STREAM_INPUTS, *new))
    found = {setting.name: setting for setting in controls.of_an_edit()}
    assert found["warmth"].kind is float and found["warmth"].default == 0.5
    mood = found["mood"].control()
    assert [value for _, value in mood.choices] == ["", "calm", "wild"] and "mood of the picture" in mood.info


@pytest.mark.parametrize(
    ("kind", "shown", "value"),
    [
        (int, "3", 3),
        (float, "2.5", 2.5),
        (bool, "off", False),
        (str, "words", "words"),
        (("ddim", "unipc"), "unipc", "unipc"),
        (tuple[str, ...], "one\n two \n", ("one", "two")),
        (tuple[float, float], "0.9, 0.99", (0.9, 0.99)),
        (int, "", None),
        (bool, "", None),
    ],
    ids=str,
)
def test_a_control_is_read_and_shows_what_was_read(kind, shown, value):
    setting = controls.Setting(name="thing", kind=kind)
    assert setting.read(shown) == value
    assert setting.read(setting.shown(value)) == value


def test_what_no_setting_can_be_is_refused_not_rounded():
    with pytest.raises(InputError, match=r"steps '2\.5' is no whole number"):
        controls.Setting(name="steps", kind=int).read("2.5")
    with pytest.raises(InputError, match="eta 'much' is no number"):
        controls.Setting(name="eta", kind=float).read("much")
    with pytest.raises(InputError, match="betas 'a, b' is not numbers"):
        controls.Setting(name="betas", kind=tuple[float, float]).read("a, b")


def test_settings_of_tuning_say_what_they_are_for():
    found = {setting.name: setting for setting in controls.of_fields(TrainConfig)}
    assert set(found) == set(TrainConfig.__dataclass_fields__)
    assert found["lr"].within == Within(0, 1) and found["lr"].default == TrainConfig.lr and found["lr"].doc
    assert "default: 500" in found["steps"].control().placeholder


# What is kept.


def edit_of(frames: np.ndarray, fps: float = 8.0) -> Edit:
    return Edit(
        frames=frames, fps=fps, metadata=tuple({"software": "tav-opt x", "seed": n} for n in range(len(frames)))
    )


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_results_are_files_that_say_how_they_were_made_and_the_oldest_go(tmp_path):
    results = KeptResults(tmp_path, limit=3_000_000)
    source = Clip(frames=noise(4, 64, 64), fps=8.0)
    first, second = results.keep(edit_of(noise(2, 4, 64, 64)), ["a cat", "a dog"], source, "a hen")
    assert results.find(second.key) == second and second.source is not None
    for kind in ("mp4", "gif"):
        assert video.read(second.path(kind)).frames.shape == (4, 64, 64, 3)
        assert video.settings_of(second.path(kind))["seed"] == 1
    assert video.settings_of(second.path("png"))["seed"] == 1
    for _ in range(6):
        (newest,) = results.keep(edit_of(noise(1, 4, 64, 64)), ["a cat"], source, "a hen")
    assert results.find(first.key) is None and results.find(newest.key) == newest
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 3_000_000


@pytest.mark.parametrize("key", ["", "x", "../x/1", "a/b", "/etc/1", f"{'a' * 24}/1", "a/1/2"])
def test_a_browser_cannot_name_a_file(tmp_path, key):
    assert KeptResults(tmp_path, 1000).find(key) is None


def test_a_history_is_what_it_says_or_nothing():
    about = {"clip": "c", "negative_prompt": "", "preset": "fast", "settings": {"steps": 3}, "files": ""}
    made = edit_history.entry("k/1", "a cat", 2.34, **about)
    assert edit_history.find(json.loads(json.dumps([made])), "k/1") == made
    assert edit_history.choices([made]) == [(f"{made['at'][11:16]} · a cat · c · fast · steps 3", "k/1")]
    for broken in (None, "x", [1], [{"key": 3}], [{**made, "settings": None}], {"a": 1}):
        assert edit_history.checked(broken) == []
    assert len(edit_history.added([made] * 40, [made])) == edit_history.MOST


def test_words_of_others_are_no_markup():
    for shown in (markup.error, markup.note, markup.progress):
        assert "<script" not in shown("<script>alert(1)</script>")
    assert "<img" not in markup.player([markup.Shown("x.mp4", '"><img src=x>')])
    assert "<b>" not in markup.table(["a"], [["<b>"]])


# An edit that is waited for.


class Steps:
    """An edit of three steps."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.cancelled = error, False

    def __iter__(self) -> Iterator[Progress]:
        for step in (1, 2, 3):
            yield Progress(stage="sample", step=step, steps=3)
        if self.error:
            raise self.error

    def result(self) -> Edit:
        return edit_of(noise(1, 1, 2, 2))

    def cancel(self) -> None:
        self.cancelled = True


def test_a_job_tells_steps_then_the_edit():
    *told, edit = EditJob(Steps())
    assert [one.progress.step for one in told if isinstance(one, Told) and one.progress] == [1, 2, 3]
    assert isinstance(edit, Edit) and told[-1].left == 0


def test_a_job_raises_what_the_edit_raises_and_another_takes_its_place():
    with pytest.raises(ServerError, match="too busy"):
        list(EditJob(Steps(ServerError("too busy", "UNAVAILABLE"))))
    jobs, first = EditJobs(), Steps()
    jobs.begin("a browser", first)
    jobs.begin("a browser", Steps())
    assert first.cancelled and jobs.cancel("a browser") and jobs.cancel("a browser") is None


# In this process.


def test_a_result_that_comes_in_parts_is_put_together():
    """As the server's editor answers where frames are more than one response has: the last one has none of them."""
    frames = np.arange(2 * 5 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 5, 2, 2, 3)

    def answer(_tensors: Any, send: Any, _stop: Any) -> dict[str, np.ndarray]:
        for part in (frames[:, :3], frames[:, 3:]):
            send({"stage": np.array([b"render"]), "step": np.array([3]), "steps": np.array([5]), "frames": part})
        return {"metadata": np.array([b"{}", b"{}"], np.object_)}

    np.testing.assert_array_equal(_Local({}, 8.0, answer).result().frames, frames)


@pytest.fixture(scope="module")
def backend(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    worker = WorkerConfig(cache=tmp_path_factory.mktemp("cache"))
    return InProcess(AppConfig(in_process=True, repository=exported.repository, worker=worker))


def test_in_process_an_edit_is_that_of_the_engine(exported, backend):
    asked = EditConfig(prompts=(PROMPT,), steps=3, guidance_scale=7.5)
    work = backend.begin("first", asked, {"preview_interval": 2, "output": "frames"})
    steps = list(work)
    assert [one.step for one in steps] == [1, 2, 3] and steps[1].preview.shape[:2] == (1, FRAMES)
    expected = editing.edit(open_clip(exported.repository, "first"), asked)
    assert np.abs(work.result().frames.astype(int) - expected).mean() < 0.05 and expected.std() > 10
    assert work.result().metadata[0]["steps"] == 3 and backend.health()[0] == "alive"


def test_in_process_an_edit_is_cancelled_and_refused_in_the_servers_words(backend):
    work = backend.begin("first", EditConfig(prompts=(PROMPT,), steps=1000), {})
    with pytest.raises(ServerError, match="cancelled"):
        for _ in work:
            work.cancel()
    with pytest.raises(InputError, match="steps 0 is not within 1…1000"):
        backend.begin("first", EditConfig(prompts=(PROMPT,), steps=0), {}).result()
    with pytest.raises(InputError, match="clip 'nobody' is not in"):
        backend.begin("nobody", EditConfig(prompts=(PROMPT,)), {})


# Tuning, without the browser.


def asked_to_tune(golden: Path, **train: Any) -> dict[str, Any]:
    clip = {"frames": 2, "height": 32, "width": 32, "stride": 1}
    return {"caption": "noise", "model": str(golden / "reference_checkpoint" / "sd"), "clip": clip, "train": train}


def test_a_run_is_stopped_and_goes_on(golden, dropped, tmp_path):
    runs = TuningRuns(tmp_path / "runs", tmp_path / "shown")
    runs.begin("one", dropped, asked_to_tune(golden, steps=400, inversion_steps=2))
    until(lambda: runs.told("one").step >= 2)
    assert runs.stop("one")
    stopped = runs.told("one")
    assert stopped.state == "stopped" and 2 <= len(stopped.losses) < 400
    with pytest.raises(InputError, match="was tuned already"):
        runs.begin("one", dropped, {})
    runs.go_on("one")
    until(lambda: runs.told("one").step > stopped.losses[-1][0])
    runs.close()
    assert [step for step, _ in runs.told("one").losses] == list(range(1, len(runs.told("one").losses) + 1))
    assert runs.names() == ["one"]


# How it is opened.


def get(url: str, opener: Any = urllib.request, **options: Any) -> int:
    try:
        ask = opener.open if hasattr(opener, "open") else opener.urlopen
        return int(ask(url, timeout=60, **options).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_strangers_see_neither_page_nor_files(exported, tmp_path):
    (tmp_path / "users").write_text("ann:secret\nbob:word\n")
    users = ("eve:own", f"@{tmp_path / 'users'}")
    page = Page(AppConfig(in_process=True, repository=exported.repository, folder=tmp_path / "out", port=0, auth=users))
    (kept,) = page.rooms.results.keep(edit_of(noise(1, 2, 16, 16)), ["x"], None, "")
    with page.opened() as address:
        file = f"{address}/{markup.address(kept.path('mp4'))}"
        assert get(file) == 401 and get(f"{address}/gradio_api/info") == 401
        known = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        login = urllib.parse.urlencode({"username": "bob", "password": "word"}).encode()
        assert known.open(f"{address}/login", login, timeout=60).status == 200 and get(file, known) == 200
        outside = urllib.parse.quote(str(tmp_path / "users"))
        assert get(f"{address}/gradio_api/file={outside}", known) in (403, 404)


def test_it_is_encrypted_where_a_certificate_is_given(exported, tmp_path):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    own.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    files = {"tls_certificate": tmp_path / "chain.pem", "tls_key": tmp_path / "key.pem"}
    config = AppConfig(in_process=True, repository=exported.repository, folder=tmp_path / "out", port=0, **files)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with Page(config).opened() as address:
        assert address.startswith("https://") and get(address, context=trusting) == 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--auth", "nobody"], "--auth is USER:PASSWORD"),
        (["--auth", "@/nowhere"], "that file cannot be read"),
        (["--root-path", "x"], "root path 'x' does not begin with /"),
        (["--tls-key", "key.pem"], "a TLS certificate and its key go together"),
        (["--clip", "../x"], "clip name '../x'"),
        (["--host", "192.0.2.1"], "port 7860 on 192.0.2.1 cannot be taken"),
        (["--url", "nowhere"], "url 'nowhere' is not host:port"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["app", *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_without_gradio_it_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    from tav_opt.app import app_config

    monkeypatch.setattr(app_config, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["app"]) == 2 and "pip install 'tav-opt[app]'" in capsys.readouterr().err


def test_the_demo_names_the_command(monkeypatch):
    from tav_opt.demo import run

    monkeypatch.setattr(run, "shutil", SimpleNamespace(which=lambda name: None))
    monkeypatch.setattr(run, "sys", SimpleNamespace(argv=[".venv/bin/tav-opt", "demo"]))
    assert run._command() == ".venv/bin/tav-opt"


@pytest.mark.full
def test_the_space_fetches_clips_and_opens_the_page(exported, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(__file__).parents[1] / "examples" / "space" / "app.py"
    settings = {"CLIPS": f"file://{exported.repository}", "GRADIO_SERVER_NAME": "127.0.0.1"}
    environment = os.environ | settings | {"GRADIO_SERVER_PORT": str(port)}
    with subprocess.Popen([sys.executable, program], cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as space:
        try:
            assert space.stdout is not None
            base, clip, page = (space.stdout.readline().decode() for _ in range(3))
            assert base.startswith("base/") and clip == "clips/first: fetched\n"
            assert f"http://127.0.0.1:{port}" in page
            assert get(f"http://127.0.0.1:{port}") == 200
        finally:
            space.terminate()
    refused = subprocess.run([sys.executable, program], env=os.environ | {"CLIPS": ""}, capture_output=True, text=True)
    assert refused.returncode == 1 and "CLIPS" in refused.stderr


def test_the_space_is_described_as_the_hub_asks_and_can_be_installed():
    """The hub's rules for a Space's front matter; what it installs has a version that is tested."""
    root = Path(__file__).parents[1]
    text = (root / "examples/space/README.md").read_text()
    front = SpaceCard(text, ignore_metadata_errors=False).data
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (root / "constraints.txt").read_text(), re.MULTILINE))
    assert front.sdk == "gradio" and front.sdk_version == pins["gradio"]
    assert (root / "examples/space" / front.app_file).is_file()
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {front.colorFrom, front.colorTo} <= colours and emoji.is_emoji(front.emoji)
    assert len(front.short_description) <= 60
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert front.license == project["license"].lower()
    assert f"Programming Language :: Python :: {front.python_version}" in project["classifiers"]
    asked = Requirement((root / "examples/space/requirements.txt").read_text().strip())
    assert asked.name == project["name"]
    for extra in asked.extras:
        for one in map(Requirement, project["optional-dependencies"][extra]):
            assert one.specifier.contains(pins[one.name]), one
