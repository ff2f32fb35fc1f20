"""The command line as it is run: every number, path, device, name and terminal, found by looking at the commands."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from tav_opt import cli, command, config, progress
from tav_opt.api.api_config import ApiConfig
from tav_opt.app.app_config import AppConfig
from tav_opt.cli.clips import AddClip, ListClips, PullClips, RemoveClips, VerifyClips
from tav_opt.cli.detect import Detect
from tav_opt.cli.edit import Edit
from tav_opt.cli.evaluate import Evaluate
from tav_opt.cli.info import Info
from tav_opt.cli.metrics import Metrics
from tav_opt.cli.personalise import Personalise
from tav_opt.cli.probe import Probe
from tav_opt.cli.push import Push
from tav_opt.cli.request import Request
from tav_opt.cli.study import MakeStudy, ServeStudy, TallyStudy
from tav_opt.cli.tune import Tune
from tav_opt.config import InputError, Within, check_numbers
from tav_opt.demo.run import DemoConfig
from tav_opt.export.__main__ import ExportConfig
from tav_opt.export.__main__ import main as export_main
from tav_opt.repository.model_files import write_model_files
from tav_opt.serving.host import serve_config, server
from tav_opt.serving.host.serve_config import ServeConfig

SETTINGS = {
    "tune": Tune,
    "personalise": Personalise,
    "edit": Edit,
    "request": Request,
    "serve": ServeConfig,
    "api": ApiConfig,
    "app": AppConfig,
    "probe": Probe,
    "export": ExportConfig,
    "clips list": ListClips,
    "clips add": AddClip,
    "clips pull": PullClips,
    "clips remove": RemoveClips,
    "clips verify": VerifyClips,
    "info": Info,
    "push": Push,
    "demo": DemoConfig,
    "metrics": Metrics,
    "detect": Detect,
    "evaluate": Evaluate,
    "study": MakeStudy,
    "study serve": ServeStudy,
    "study tally": TallyStudy,
}
"""What each command line is read into."""
GIVEN = {
    "tune": "--model nowhere --prompt x --video absent.mp4 --out ckpt",
    "personalise": "--model nowhere --prompt x --images absent --out personal",
    "edit": "unread --prompt x --out e.mp4",
    "request": "--url localhost:9 --attempts 1 --clip x --prompt x --out e.mp4",
    "serve": "--repository repository --grpc-port 0 --http-port 0 --metrics-port 0",
    "api": "--port 0 --keys absent.txt",
    "app": "--folder out --root-path wrong",
    "probe": "--http-url http://127.0.0.1:9 --metrics-url http://127.0.0.1:9/metrics",
    "export": "unread --repository repository",
    "clips list": "--repository repository",
    "clips add": "unread --repository repository",
    "clips pull": "memory://nowhere --repository repository",
    "clips remove": "x --repository repository",
    "clips verify": "--repository repository",
    "info": "unread",
    "push": "unread owner/name",
    "demo": "--model nowhere --video absent.mp4 --prompt x --edit y --in-process",
    "metrics": "absent.mp4 --source absent.mp4 --prompt x",
    "evaluate": "absent.yaml --out out",
    "study": "absent --against x --out study",
    "study serve": "absent",
    "study tally": "absent",
    "detect": "absent.mp4 maps.mp4 --kind canny",
}
"""What is needed, all of it either right or found wrong only after everything that is tried here."""
POSITIONAL = {
    ("metrics", "edit"),
    ("detect", "source"),
    ("detect", "out"),
    ("edit", "checkpoint"),
    ("export", "checkpoints"),
    ("clips add", "checkpoint"),
    ("info", "path"),
    ("push", "checkpoint"),
    ("evaluate", "suite"),
    ("study", "run"),
    ("study serve", "study"),
    ("study tally", "study"),
}
NAMES = {"guidance_scale": "guidance"}


def test_every_command_is_here():
    assert {name.split()[0] for name in SETTINGS} == set(cli.COMMANDS)


def fields_of(kind: type) -> Iterator[tuple[type, str, Any]]:
    """Of a configuration and those in it: the class, a field's name and its type."""
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from fields_of(hint)
        else:
            yield kind, name, hint


NUMBERS = [
    (name, kind, field, hint)
    for name, settings in SETTINGS.items()
    for kind, field, hint in fields_of(settings)
    if {int, float} & {hint, *get_args(hint)}
]
PATHS = [
    (name, field)
    for name, settings in SETTINGS.items()
    for _, field, hint in fields_of(settings)
    if Path in (hint, *get_args(hint))
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder: a checkpoint that is none inside, a repository without clips."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unread").mkdir()
    (tmp_path / "unread" / "checkpoint.json").write_text("{}")
    write_model_files(tmp_path / "repository")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], name: str, *options: str) -> tuple[int, str]:
    """Exit status and stderr of a command with what it needs and options that come last."""
    try:
        status = cli.main([*name.split(), *GIVEN[name].split(), *options])
    except SystemExit as end:  # of tyro
        status = int(end.code or 0)
    return status, capsys.readouterr().err


def assert_one_line(status: int, error: str, *words: str, code: int = 2) -> None:
    assert status == code and error.count("\n") == 1 and error.startswith("tav-opt "), error
    for word in words:
        assert word in error, error


# Numbers.


def test_there_are_many_numbers():
    assert len(NUMBERS) > 50 and {field for *_, field, _ in NUMBERS} >= {"betas", "grpc_port", "deadline", "timeout"}


NUMBERS = [number for number in NUMBERS if number[2] != "gpus"]  # these are numbers of what is there


@pytest.mark.parametrize(("name", "kind", "field", "hint"), NUMBERS, ids=lambda value: str(value)[:30])
def test_every_number_has_a_range_that_is_held(name, kind, field, hint):
    within = config.ranges(kind)[field]
    given = {f.name: None for f in fields(kind)}

    def check(value: float) -> None:
        held = object.__new__(kind)
        for one, nothing in given.items():
            object.__setattr__(held, one, nothing)
        object.__setattr__(held, field, (value, value) if "tuple" in str(hint) else value)
        check_numbers(held)

    check(within.low)
    wrong = [within.low - 1, float("nan"), -float("inf"), within.high if within.below else within.high * 2 + 1]
    wrong += [float("inf")] if within.high != float("inf") else []
    for value in wrong:
        if value == float("inf") and within.high == float("inf"):
            continue
        with pytest.raises(InputError, match=f"{field.replace('_', ' ')} .* is not within {within.low}…"):
            check(value)


def test_each_command_refuses_a_number_out_of_range_before_anything_else(here, capsys):
    found = [number for number in NUMBERS if number[0] != "export" or "video" not in number[2]]
    for name, kind, field, hint in found:
        within: Within = config.ranges(kind)[field]
        value = "nan" if "float" in str(hint) else str(int(within.low) - 1)
        values = [value, "0.9"] if "tuple" in str(hint) else [value]
        status, error = run(capsys, name, f"--{NAMES.get(field, field).replace('_', '-')}", *values)
        assert_one_line(status, error, f"{field.replace('_', ' ')} {value} is not within {within}")
    assert {path.name for path in here.iterdir()} == {"unread", "repository"}


# Paths.


class Spawned(Exception):
    """The server would be started now."""


@pytest.mark.parametrize("content", [None, "text", "folder"])
@pytest.mark.parametrize(("name", "field"), PATHS, ids=lambda value: str(value).replace(" ", "-"))
def test_every_relative_path_is_seen_from_the_users_folder(here, capsys, monkeypatch, name, field, content):
    """It is as good, and as bad, as the same path written from the root."""
    told: list[str] = []

    def spawn(launch: Any, options: list[str]) -> None:
        (models,) = (Path(option.partition("=")[2]) for option in options if option.startswith("--model-repository"))
        texts = [path.read_text() for path in sorted(models.rglob("config.pbtxt"))]
        links = [os.readlink(path) for path in sorted(models.rglob("*")) if path.is_symlink()]
        told.append(str([launch.command[0], [o for o in options if "tls" in o or "cert" in o], texts, links]))
        raise Spawned

    monkeypatch.setattr(server, "_spawn", spawn)
    monkeypatch.setattr(serve_config, "_check_tls", lambda config: None)  # without the other files of a pair
    (here / "sub").mkdir()
    path = here / "sub" / "thing"
    if content == "text":
        path.write_text("text")
        path.chmod(0o755)
    elif content == "folder":
        (path / "inside").mkdir(parents=True)
    results = []
    for given in ("sub/thing", str(path)):
        if (name, field) in POSITIONAL:
            monkeypatch.setitem(GIVEN, name, " ".join([given, *GIVEN[name].split()[1:]]))
            options = []
        else:
            options = [f"--{field.replace('_', '-')}", given]
        if field == "tls_certificate":
            options += ["--tls-key", str(here / "key")]
        status, error = run(capsys, name, *options)
        results.append((status, error.replace(str(path), "sub/thing"), *told))
        told.clear()
    assert results[0] == results[1]
    if name == "serve" and results[0][2:]:
        assert "sub/thing" not in results[0][2].replace(str(path), ""), "the server runs in another folder"


# Devices.


@pytest.mark.parametrize("name", ["tune", "edit"])
@pytest.mark.parametrize("device", ["cuda", "cuda:99", "cuda:-1", "mps", "xpu", "banana", "meta", "", "cpu:x", "é"])
def test_a_device_that_is_not_there_is_one_line(here, capsys, name, device):
    if device in ("cuda", "mps", "xpu") and torch.accelerator.is_available():
        pytest.skip("there may be one here")
    status, error = run(capsys, name, "--device", device)
    assert_one_line(status, error, f"device {device!r} cannot be used", "cpu")


# Errors that nobody foresaw.


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("two\nlines"), 1, "ValueError: two lines"),
        (MemoryError(), 1, "MemoryError"),
        (RuntimeError("x" * 100_000), 1, "RuntimeError: xxx"),
        (KeyError("missing"), 1, "KeyError: 'missing'"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (InputError("bad\nvalue"), 2, "bad value"),
        (OSError("a library's own"), 1, "OSError: a library's own"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_any_error_is_one_line_and_a_traceback_under_debug(capsys, monkeypatch, error, code, words):
    seen: list[list[str]] = []

    def fail(arguments: Any) -> None:
        seen.append(list(arguments))
        raise error

    monkeypatch.setitem(cli.COMMANDS, "probe", fail)
    assert cli.main(["probe", "--timeout", "1"]) == code
    told = capsys.readouterr().err
    assert told.startswith(f"tav-opt probe: {words}") and told.count("\n") == 1 and len(told) < 700
    for arguments in (["--debug", "probe", "--timeout", "1"], ["probe", "--timeout", "1", "--debug"]):
        assert cli.main(arguments) == code
        debugged = capsys.readouterr().err
        assert "Traceback" in debugged and "in fail" in debugged and debugged.endswith(told)
    assert seen == [["--timeout", "1"]] * 3


def test_debug_is_for_the_other_programs_and_every_help_says_so(here, capsys):
    assert export_main(["absent", "--debug"]) == 2
    assert "Traceback" in (error := capsys.readouterr().err) and "python -m tav_opt.export: checkpoint absent" in error
    for arguments in (["--help"], ["probe", "--help"], ["clips", "list", "-h"]):
        try:
            cli.main(arguments)
        except SystemExit as end:
            assert not end.code
        assert command.DEBUG_HELP in capsys.readouterr().out


# Texts and terminals.


@pytest.mark.parametrize("name", ["tune", "edit", "request", "demo"])
def test_a_prompt_that_is_no_utf_8_is_one_line(here, capsys, name):
    status, error = run(capsys, name, "--prompt", os.fsdecode(b"caf\xe9"))
    assert_one_line(status, error, r"prompt 'caf\udce9' is not UTF-8")


@pytest.mark.parametrize("name", ["edit", "request"])
def test_a_negative_prompt_that_is_no_utf_8_is_one_line(here, capsys, name):
    assert_one_line(*run(capsys, name, "--negative-prompt", os.fsdecode(b"\xff")), "is not UTF-8")


def test_terminals_that_only_know_ascii_show_every_text(monkeypatch):
    shown = io.BytesIO()
    stream = io.TextIOWrapper(shown, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert command.run("x", lambda _: print("café × …", os.fsdecode(b"\xff")), []) == 0
    assert shown.getvalue() == rb"caf\xe9 \xd7 \u2026 \udcff" + b"\n"
    for arguments in (["--help"], ["tune", "--help"]):
        try:
            assert cli.main(arguments) == 0
        except SystemExit as end:
            assert not end.code
    stream.flush()
    assert b"usage: tav-opt COMMAND" in shown.getvalue() and b"--save-every" in shown.getvalue()


def test_a_real_process_with_an_ascii_terminal(here):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    code = "import sys; from tav_opt.cli import main; sys.exit(main())"
    arguments = ["probe", "--http-url", "http://caf\xe9:9"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True)
    assert done.returncode == 1 and b"dead: nothing answers" in done.stdout, done.stderr


# Where results go.


@pytest.mark.parametrize("name", ["edit", "request"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--out e.avi", "e.avi: .avi is not written"),
        ("--out folder.mp4", "folder.mp4 exists"),
        ("--out folder", "folder exists"),
        ("--out file/e.mp4", "file/e.mp4 cannot be written: Not a directory"),
        ("--out /proc/x/e.mp4", "/proc/x/e.mp4 cannot be written"),
        (f"--out {'n' * 252}.mp4", "File name too long"),
        (f"--out {'n' * 250}.mp4 --prompt y", "File name too long"),
        (f"--out {'d' * 256}/e.mp4", "File name too long"),
        ("--out numbered --prompt y", "numbered-2 exists"),
        ("--out . --prompt y", ". exists"),
        ("--out .. --prompt y", "..-1: .-1 is not written"),
        ("--out /", "/ exists"),
    ],
)
def test_where_an_edit_goes_is_checked_before_the_work(here, capsys, name, options, words):
    for folder in ("folder", "folder.mp4", "numbered-2"):
        (here / folder).mkdir()
    (here / "file").touch()
    before = sorted(here.rglob("*"))
    assert_one_line(*run(capsys, name, *options.split()), words)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("name", ["tune", "demo", "export", "clips add"])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file", "cannot be written: Not a directory"),
        ("file/below", "cannot be written: Not a directory"),
        ("d" * 256, "File name too long"),
        ("/proc/x", "cannot be written"),
    ],
)
def test_where_a_folder_goes_is_checked_before_the_work(here, capsys, name, out, words):
    (here / "file").touch()
    option = "--out" if name in ("tune", "demo") else "--repository"
    assert_one_line(*run(capsys, name, option, out), words, out)


# Progress.


class Clock:
    """Time as it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_come_every_tenth_or_thirty_seconds():
    clock, log = Clock(), io.StringIO()
    lines = progress.Lines(clock, log)
    clock.now += 29.9
    lines.tick()
    assert log.getvalue() == ""
    clock.now += 0.1
    lines.tick()
    assert log.getvalue() == "no step is done yet, after 30 s\n"
    for step in range(1, 501):
        clock.now += 0.1
        lines.step("tune", step, 500, 0.25)
    told = log.getvalue().splitlines()[1:]
    assert [line.split()[2] for line in told] == [str(step) for step in range(50, 501, 50)]
    assert told[0] == "tune: step 50 of 500, loss 0.2500, after 35 s"
    lines.step("invert", 1, 1000)
    for _ in range(31):  # one long step
        clock.now += 1
        lines.tick()
    assert log.getvalue().splitlines()[11:] == ["invert: step 1 of 1000, after 110 s"]


def test_a_run_that_goes_on_counts_from_where_it_was():
    log = io.StringIO()
    lines = progress.Lines(Clock(), log)
    for step in range(401, 500):
        lines.step("tune", step, 500)
    assert [line.split()[2] for line in log.getvalue().splitlines()] == ["450"]


def test_nothing_but_lines_goes_to_what_is_no_terminal(capsys):
    with progress.shown() as on_progress:
        for step in range(1, 4):
            on_progress("sample", step, 3)
    assert capsys.readouterr().err == "".join(f"sample: step {n} of 3, after 0 s\n" for n in (1, 2, 3))


def test_a_terminal_shows_bars(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.shown() as on_progress:
        for stage in ("invert", "sample"):
            for step in range(1, 4):
                on_progress(stage, step, 3, 0.5)
    assert "invert: 100%" in terminal.getvalue() and "sample: 100%" in terminal.getvalue()
