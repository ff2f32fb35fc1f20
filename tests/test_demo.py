"""The whole path on real clips: tuned, exported, served by the real server, edited over gRPC, shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exported import FRAMES, SIDE, export_once
from PIL import Image

import tav_opt
from tav_opt import cli, video
from tav_opt.config import InputError
from tav_opt.serving.host.tritonserver import find_tritonserver

CLIPS = {
    "man-skiing": ("a man is skiing", "a panda is skiing"),
    "rabbit-watermelon": ("a rabbit eats", "a cat eats"),
    "man-surfing": ("a man is surfing", "a panda is surfing"),
    "car-turn": ("a car moves", "a car on snow"),
}
SMALL = ["--frames", "4", "--size", "64", "--steps", "2", "--ddim-steps", "2"]


def no_server() -> str:
    try:
        find_tritonserver()
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all demos: the base is exported once."""
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.mark.skipif(bool(no_server()), reason=no_server() or "the server is here")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name != "car-turn")) for name in CLIPS]
)
def test_real_clips(shared, shallow, out, capsys, name):
    caption, edit = CLIPS[name]
    model, clip = shallow, shared / "clips" / f"{name}.mp4"
    own = ["--video", str(clip), "--prompt", caption, "--edit", edit, "--model", str(model), "--out", str(out)]
    assert cli.main(["demo", *own, *SMALL]) == 0, capsys.readouterr().err
    shown = video.read(out / "side-by-side.mp4").frames
    source = video.read(clip, count=4, uniform=True, height=64, width=64).frames
    panel = shown[:, -268:-12, 12:268]  # the source, four times as large, under its caption
    assert len(shown) == 4 and abs(panel[:, 2::4, 2::4].astype(int) - source).mean() < 10
    assert Image.open(out / "contact-sheet.png").width > 700 and (out / "side-by-side.gif").stat().st_size > 1000
    left = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout
    assert not left, f"still running: {left}"


def test_in_process_on_the_packages_own_clip(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["demo", "--in-process", "--out", str(out), "--edit", "a tiger", *SMALL]) == 0
    said = capsys.readouterr().out
    assert ("RANDOM" in said) != (Path(tav_opt.__file__).parent / "demo" / "model").is_dir()
    assert np.asarray(video.read(out / "side-by-side.mp4").frames).std() > 10


@pytest.mark.parametrize(
    "options, words",
    [
        (["--prompt", "x"], "--video"),
        (["--video", "x.mp4"], "--edit"),
        (["--video", "x.mp4", "--prompt", "x", "--edit", "y"], "x.mp4"),
        (["--edit", ""], "empty"),
        (["--size", "30"], "30"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, options, words):
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


def test_another_folders_files_are_kept(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2 and (tmp_path / "mine.txt").exists()


def test_latency_times_only_right_engines(golden, shallow, tmp_path, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import latency
    import presets

    ckpt = presets.untuned(shallow, tmp_path / "ckpt", frames=FRAMES, size=SIDE, steps=2)
    repository = export_once(golden, tmp_path_factory.getbasetemp()).repository  # with the graphs of that base and size
    config = latency.Latency(
        preset=str(ckpt), engines=("pytorch", "onnxruntime"), steps=2, calls=2, out=tmp_path / "latency.json"
    )
    assert latency.measure(config, ckpt, repository) == 0
    assert "onnxruntime" in (tmp_path / "latency.json").read_text() and "UNet step, b = 2" in capsys.readouterr().out

    from tav_opt.engines.exported import ExportedEngine

    right = ExportedEngine.decode
    monkeypatch.setattr(ExportedEngine, "decode", lambda self, latents: right(self, latents) // 2)
    (tmp_path / "latency.json").unlink()
    assert latency.measure(config, ckpt, repository) == 1 and not (tmp_path / "latency.json").exists()
    assert "wrong" in capsys.readouterr().err


def test_programs_run_as_scripts():
    done = subprocess.run([sys.executable, "benchmarks/inflation.py", "--help"], cwd=Path(__file__).parents[1])
    assert done.returncode == 0
