"""The command line: every bad input is one line that names the value, exit status 2, and nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encoded import comments

from tav_opt import cli, client, video

ROOT = Path(__file__).parents[1]
FRAMES = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command, in this process."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as error:  # of tyro
        status = int(error.code or 0)
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    video.write(path, FRAMES, 8)
    return path


@pytest.fixture(scope="module")
def sd(golden):
    return golden / "reference_checkpoint" / "sd"


@pytest.fixture(scope="module")
def tuned(clip, sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "ckpt"
    options = "--prompt x --frames 3 --stride 1 --height 64 --width 64 --steps 2 --inversion-steps 2".split()
    assert cli.main(["tune", "--model", str(sd), "--video", str(clip), "--out", str(folder), *options]) == 0
    return folder


@pytest.fixture
def harmed(clip, tmp_path):
    """Files that are no good, by name."""
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "truncated.mp4").write_bytes(clip.read_bytes()[:900])
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    return tmp_path


@pytest.mark.parametrize(
    "options, words",
    [
        ("--video nowhere.mp4", "nowhere.mp4"),
        ("--video {harmed}/empty.mp4", "empty.mp4"),
        ("--video {harmed}/truncated.mp4", "truncated.mp4"),
        ("--video {harmed}/text.mp4", "text.mp4"),
        ("--frames 7 --stride 1", "7"),
        ("--frames 0", "0"),
        ("--height 60", "60"),
        ("--model nowhere", "nowhere"),
        ("--trainable attn9", "attn9"),
        ("--lr nan", "nan"),
        ("--seed -1", "-1"),
    ],
)
def test_tune_refuses(capsys, harmed, clip, sd, options, words):
    out = harmed / "ckpt"
    usual = ["--model", sd, "--video", clip, "--prompt", "x", "--out", out]
    usual += "--frames 3 --stride 1 --height 64 --width 64 --steps 2 --inversion-steps 2".split()
    status, _, error = run(capsys, "tune", *usual, *options.format(harmed=harmed).split())
    assert status == 2 and error.count("\n") == 1 and words in error, error
    assert not (out / "checkpoint.json").exists() and not list(harmed.glob("*.safetensors"))


@pytest.mark.parametrize("prompt, words", [("", "empty"), (" ", "empty"), ("a panda " * 9 + "skiing", "skiing")])
def test_prompts_are_refused(capsys, tuned, clip, sd, tmp_path, prompt, words):
    status, _, error = run(capsys, "edit", tuned, "--prompt", prompt, "--out", tmp_path / "e.mp4", "--steps", "1")
    assert status == 2 and error.count("\n") == 1 and words in error, error
    options = "--frames 3 --stride 1 --height 64 --width 64 --steps 2".split()
    status, _, error = run(
        capsys, "tune", "--model", sd, "--video", clip, "--prompt", prompt, "--out", tmp_path / "ckpt", *options
    )
    assert status == 2 and error.count("\n") == 1 and words in error, error
    assert not list(tmp_path.glob("*.mp4"))


def test_edits_and_the_source_beside_them(capsys, tuned, tmp_path):
    options = "--steps 1 --inversion-steps 2 --guidance 3 --seed 5".split()
    usual = ["edit", tuned, "--prompt", "a cat", "--prompt", "a dog", *options]
    status, out, error = run(capsys, *usual, "--prompt-metadata", "--out", tmp_path / "e.gif")
    assert status == 0 and {path.name for path in tmp_path.iterdir()} == {"e-1.gif", "e-2.gif"}
    edits = [video.read(tmp_path / name).frames for name in ("e-1.gif", "e-2.gif")]
    assert edits[0].shape == (3, 64, 64, 3) and "e-2.gif" in out
    told = error.splitlines()
    assert told[0].startswith("tav-opt edit: --seed 5 has no effect") and error.count("no effect") == 1
    assert told[1] == "tav-opt edit: pytorch on cpu in float32"
    expected = {"model": "sd", "clip": "ckpt", "steps": 1, "guidance_scale": 3, "seed": 5, "prompts": ["a dog"]}
    assert comments(tmp_path / "e-2.gif")[0] | expected == comments(tmp_path / "e-2.gif")[0]

    assert run(capsys, *usual, "--side-by-side", "--out", tmp_path / "all")[0] == 0
    together = video.read(tmp_path / "all").frames
    assert len(together) == 3 and together.shape[2] > 3 * 256 > together.shape[1]
    for panel, edit in enumerate(edits, start=1):
        left = 12 + panel * (256 + 12)
        shown = together[:, -12 - 256 : -12, left : left + 256].reshape(3, 64, 4, 64, 4, 3).mean((2, 4))
        assert np.abs(shown - edit).mean() < 12
    for path in (tmp_path / "all").iterdir():
        assert comments(path)[0]["clip"] == "ckpt"
        assert not any(word in path.read_bytes() for word in (b"cat", b"dog", b"prompt")), path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", "5"], True),
        (["--seed=33"], True),
        (["--seed", "5", "--eta", "0.5"], False),
        (["--seed", "5", "--no-inversion"], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("clips", [{}, {"inversion": False}], ids=["usual", "never inverted"])
def test_a_seed_without_effect_is_said_to_have_none(capsys, monkeypatch, tmp_path, options, said, clips):
    """Of what was used: a clip may say itself that it is not inverted."""

    def edited(_self, clip, config, *, left_out, **_options):
        used = replace(config, **{name: value for name, value in clips.items() if name in left_out})
        return client.Edit(frames=FRAMES[None], fps=8, metadata=({"inversion": used.inversion, "eta": used.eta},))

    monkeypatch.setattr(client.Client, "edit", edited)
    status, _, error = run(capsys, "request", "--clip", "x", "--prompt", "x", *options, "--out", tmp_path / "e.gif")
    assert status == 0 and ("has no effect" in error) == (said and not clips) and error.count("\n") <= int(said), error


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda folder: (folder / "checkpoint.json").unlink(), "not a checkpoint"),
        (lambda folder: (folder / "checkpoint.json").write_text("{"), "JSON"),
        (lambda folder: (folder / "values.safetensors").write_bytes(b"x" * 100), "values.safetensors"),
        (lambda folder: shutil.rmtree(folder), "not a checkpoint"),
    ],
)
def test_harmed_checkpoints_are_refused(capsys, tuned, tmp_path, harm, words):
    folder = shutil.copytree(tuned, tmp_path / "ckpt")
    harm(folder)
    status, _, error = run(capsys, "edit", folder, "--prompt", "x", "--out", tmp_path / "e.mp4")
    assert status == 2 and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "e.mp4").exists()


def test_a_finished_checkpoint_is_not_overwritten(capsys, tuned, clip, sd):
    before = (tuned / "values.safetensors").stat().st_mtime_ns
    options = "--prompt x --frames 3 --stride 1 --height 64 --width 64 --steps 2".split()
    status, _, error = run(capsys, "tune", "--model", sd, "--video", clip, "--out", tuned, *options)
    assert status == 2 and "finished" in error and (tuned / "values.safetensors").stat().st_mtime_ns == before


def test_no_server(capsys, tmp_path):
    status, _, error = run(
        capsys,
        "request",
        "--url",
        "localhost:9",
        "--attempts",
        "1",
        "--clip",
        "x",
        "--prompt",
        "x",
        "--out",
        tmp_path / "e.mp4",
    )
    assert status == 2 and error.count("\n") == 1 and "localhost:9" in error and not list(tmp_path.iterdir())


def test_unknown_command(capsys):
    status, _, error = run(capsys, "paint")
    assert status == 2 and "paint" in error


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_answers_help(capsys, name):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0 and name in out


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "tav_opt.export", "--help"],
        [sys.executable, "benchmarks/latency.py", "--help"],
        [str(Path(sys.executable).parent / "tav-opt"), "--help"],
    ],
    ids=["export", "latency", "tav-opt"],
)
def test_programs_answer_help(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["edit", "--help"], ["probe", "--http-url", "http://localhost:9"]])
def test_a_pipe_that_nobody_reads_is_no_error(arguments):
    """As of `tav-opt … | head`."""
    command = [sys.executable, "-c", "import sys; from tav_opt.cli import main; sys.exit(main())"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as stdout:
        done = subprocess.run([*command, *arguments], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_what_is_no_checkpoint_is_refused_before_torch_is_loaded():
    code = "import sys; from tav_opt import cli; sys.exit(cli.main(sys.argv[1:]) + 100 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, "edit", "nope", "--prompt", "x"], cwd=ROOT, capture_output=True)
    assert done.returncode == 2, done.stderr
