"""Checkpoints, clips and manifests of strangers: each lie is one line, in time, and nothing outside is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import Exported, export_once
from safetensors.torch import load_file, save_file

from tav_opt import checkpoint, cli
from tav_opt.clip_folder import ClipFolder
from tav_opt.config import InputError
from tav_opt.engines import registry
from tav_opt.export import exporting
from tav_opt.files import discard, open_plain, read_json, sha256, whole
from tav_opt.repository import clips


@pytest.fixture(scope="module")
def exported(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture
def tuned(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.checkpoint, tmp_path / "tuned"))


@pytest.fixture
def repository(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.repository, tmp_path / "repository"))


def clip_of(repository: Path, name: str = "first") -> Path:
    return repository / "tune_a_video_stream" / "1" / "clips" / name


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != ".lock"}


LIES: dict[str, dict[str, Any]] = {
    "a path in frames": {"frames": "../../../../escaped"},
    "a path in height": {"height": "64/../../x"},
    "a path in the hash": {"base_hash": "../" * 22},
    "an upper-case hash": {"base_hash": "A" * 64},
    "a hash and a line": {"base_hash": "0" * 64 + "\n"},
    "no frames": {"frames": 0},
    "frames of a float": {"frames": 4.0},
    "frames that are true": {"frames": True},
    "a list of frames": {"frames": [4]},
    "very many frames": {"frames": 10**400},
    "no fps": {"fps": 0},
    "fps of NaN": {"fps": float("nan")},
    "fps without end": {"fps": float("inf")},
    "fps of text": {"fps": "8"},
    "a prompt of numbers": {"prompt": 7},
    "a list of prompts": {"prompt": ["a panda"]},
    "steps of text": {"inversion_steps": "50"},
    "no steps": {"inversion_steps": 0},
    "a base of nothing": {"base": ""},
    "a base of a list": {"base": ["x"]},
    "files of a list": {"files": ["values.safetensors"]},
    "a file elsewhere": {"files": {"../tuned/values.safetensors": "0" * 64}},
    "a hash of a number": {"files": {"values.safetensors": 7}},
    "settings of a list": {"settings": []},
    "an addition of another name": {"additions": {"lora": ["x"]}},
    "additions of a list": {"additions": ["x"]},
    "LoRAs that are no texts": {"additions": {"loras": [5]}},
    "a VAE of numbers": {"additions": {"vae": 7}},
}


@pytest.mark.parametrize("name", LIES)
def test_a_description_that_lies_is_refused_and_nothing_is_touched(tuned, tmp_path, name, capsys):
    change(tuned / "checkpoint.json", **LIES[name])
    before = everything(tmp_path)
    with pytest.raises(InputError, match=next(iter(LIES[name]))) as refused:
        checkpoint.load(tuned)
    assert len(str(refused.value).splitlines()) == 1
    (tmp_path / "repository").mkdir()
    for command in (["clips", "add"], ["export"]):
        assert cli.main([*command, str(tuned), "--repository", str(tmp_path / "repository")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert {path for path in everything(tmp_path) if "repository" not in path.parts} == before
    assert not list((tmp_path / "repository").rglob("*.onnx"))


def sixty(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


DOCUMENTS: dict[str, tuple[bytes, str]] = {
    "nested": (sixty(100_000), "nested too deep|stands|not JSON"),
    "nested names": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
    "a list": (b"[]", "holds a list"),
    "a number": (b"7", "holds a int"),
    "nothing": (b"", "is not JSON"),
    "half": (b'{"version": 1', "is not JSON"),
    "another encoding": ('{"prompt": "é"}'.encode("latin-1"), "is not JSON"),
    "digits": (b'{"version": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    "twice": (b'{"version": 1, "version": 1}', "'version' stands in it twice"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_is_none_is_refused(tuned, name):
    content, words = DOCUMENTS[name]
    (tuned / "checkpoint.json").write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        checkpoint.load(tuned)
    assert len(str(refused.value)) < 500


def test_a_document_may_begin_with_a_mark_and_has_a_largest_size(tuned, monkeypatch):
    file = tuned / "checkpoint.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert checkpoint.load(tuned).info.frames == 4
    monkeypatch.setattr("tav_opt.files.MAX_JSON_BYTES", 100)
    with pytest.raises(InputError, match="is larger than"):
        checkpoint.load(tuned)


def altered(folder: Path, file: str, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes tensors, and the description with them, as whoever lies on purpose does."""
    tensors = load_file(folder / file)
    how(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file)
    description = ClipFolder.at(folder)
    told = description.description
    change(folder / description.file, files=told["files"] | {file: sha256(folder / file)})


def first(tensors: dict[str, torch.Tensor]) -> str:
    return sorted(tensors)[0]


def fill(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[first(tensors)].view(-1)[:1].fill_(value)


def cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({first(tensors): tensors[first(tensors)].to(dtype)})


def shaped(*index: Any) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({first(tensors): tensors[first(tensors)][index]})


TENSORS = {
    "NaN in the values": ("values", fill(float("nan")), "NaN or infinite"),
    "infinite values": ("values", fill(float("inf")), "NaN or infinite"),
    "integer values": ("values", cast(torch.int32), "is int32, not float32"),
    "boolean values": ("values", cast(torch.bool), "is bool, not float32"),
    "values of eight bits": ("values", cast(torch.float8_e4m3fn), "is float8_e4m3fn, not float32"),
    "fewer values": ("values", lambda tensors: tensors.pop(first(tensors)), "other values|lacks"),
    "values of another shape": ("values", shaped(slice(1, None)), "does not fit|is \\("),
    "values of another rank": ("values", shaped(None), "does not fit|is \\("),
    "NaN in the latents": ("latents", fill(float("nan")), "NaN or infinite"),
    "infinite latents": ("latents", fill(float("-inf")), "NaN or infinite"),
    "integer latents": ("latents", cast(torch.int64), "is int64, not float32"),
    "latents of fewer frames": ("latents", shaped(slice(None), slice(None), slice(1, None)), "not \\(1, c, f, h, w\\)"),
    "latents of another rank": ("latents", shaped(0), "not \\(1, c, f, h, w\\)"),
    "latents of another height": ("latents", shaped(..., slice(1, None), slice(None)), "not \\(1, c, f, h, w\\)"),
    "latents of fewer channels": ("latents", shaped(slice(None), slice(1, None)), "differ in shape"),
    "no inverted latents": ("latents", lambda tensors: tensors.pop("inverted"), "lacks the inverted latents"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_lie_are_refused_at_load_at_export_and_by_the_server(tuned, repository, name):
    file, how, words = TENSORS[name]
    for folder in (tuned, clip_of(repository)):
        altered(folder, f"{file}.safetensors", how)
    if name != "fewer values":  # which are a clip's that was tuned otherwise
        with pytest.raises(InputError, match=words):
            registry.load(tuned)
    with pytest.raises(InputError, match=words):
        registry.load(clip_of(repository))
    before = everything(repository)
    with pytest.raises(InputError, match=words):
        exporting.export(tuned, repository, name="second")
    assert everything(repository) == before


def test_latents_of_both_kinds_with_other_channels_do_not_fit_their_base(tuned, repository):
    for folder in (tuned, clip_of(repository)):
        altered(folder, "latents.safetensors", lambda t: t.update({name: x[:, 1:] for name, x in t.items()}))
        with pytest.raises(InputError, match=r"latents .*\(1, 3, "):
            registry.load(folder)


BASES: dict[str, dict[str, Any]] = {
    "a graph elsewhere": {"graphs": [{"name": "../unet", "inputs": [], "outputs": [], "values": {}}]},
    "graphs of text": {"graphs": "unet"},
    "latents of text": {"latents": ["4", 4, 8, 8]},
    "too few latents": {"latents": [4, 4]},
    "tokens of text": {"tokens": "77"},
    "a scheduler of text": {"scheduler": "ddim"},
    "a scaling of NaN": {"scaling_factor": float("nan")},
    "files of text": {"files": "all"},
    "files elsewhere": {"files": {"/etc/passwd": "0" * 64}},
    "no files": {"files": None},
}


@pytest.mark.parametrize("name", BASES)
def test_a_base_whose_manifest_lies_is_refused(repository, name):
    (base,) = (repository / "tune_a_video_stream" / "1" / "base").iterdir()
    change(base / "manifest.json", **BASES[name])
    with pytest.raises(InputError, match=f"{next(iter(BASES[name]))}.*"):
        registry.load(clip_of(repository))


def quickly(act: Callable[[], object]) -> BaseException | None:
    """What a call raises, which it must do within a second or so."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for somebody who writes into the pipe"
    return raised[0] if raised else None


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device"])
@pytest.mark.parametrize("file", ["manifest.json", "values.safetensors"])
def test_what_is_no_plain_file_is_refused_at_once(repository, kind, file):
    path = clip_of(repository) / file
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    error = quickly(lambda: registry.load(ClipFolder(clip_of(repository), "manifest.json")))
    assert isinstance(error, InputError), error
    assert quickly(lambda: clips.verify(repository)) is None
    assert any(file in line or "cannot be read" in line for line in clips.verify(repository))
    with pytest.raises(InputError):
        open_plain(path)


def test_one_broken_clip_keeps_nobody_else_from_being_listed_verified_or_removed(exported, repository, capsys):
    version = clip_of(repository).parents[1]
    for name in ("second", "third"):
        shutil.copytree(clip_of(repository), clip_of(repository, name))
    (clip_of(repository, "second") / "manifest.json").write_text("[[[")
    at = ["--repository", str(repository)]
    assert cli.main(["clips", "list", *at]) == 1
    told = capsys.readouterr()
    assert [line.partition(":")[0] for line in told.out.splitlines()] == ["first", "third"]
    assert told.err.startswith("tav-opt clips: second: ") and told.err.count("\n") == 1
    assert cli.main(["clips", "verify", *at]) == 1
    assert all("second" in line for line in capsys.readouterr().out.splitlines())
    assert cli.main(["clips", "remove", "first", "third", *at]) == 0
    assert [path.name for path in (version / "clips").iterdir() if path.name[0] != "."] == ["second"]
    assert list((version / "base").iterdir()), "who knows which base it needs"
    assert cli.main(["clips", "remove", "second", *at]) == 0
    assert not [path for path in (version / "base").iterdir() if path.name[0] != "."]


def test_a_captions_control_characters_are_spelt_out(repository, capsys):
    change(clip_of(repository) / "manifest.json", prompt="a cat\x1b[2J\r\nsecond: 4 frames\x07 é")
    assert cli.main(["clips", "list", "--repository", str(repository)]) == 0
    out = capsys.readouterr().out
    assert out.endswith(r": a cat\x1b[2J\r\nsecond: 4 frames\x07 é" + "\n") and out.count("\n") == 1


def test_a_clip_that_is_a_link_is_replaced_again_and_again(exported, repository, tmp_path):
    """What it leads to stays."""
    place = tmp_path / "elsewhere"
    shutil.move(clip_of(repository), place)
    kept = everything(place)
    clip_of(repository).symlink_to(place)
    for _ in range(3):
        exporting.export(exported.checkpoint, repository, name="first")
        assert not clip_of(repository).is_symlink() and everything(place) == kept
    discard(clip_of(repository))
    clip_of(repository).symlink_to(place)
    clips.remove(repository, "first")
    assert everything(place) == kept and not clip_of(repository).is_symlink()
    assert [path.name for path in clip_of(repository).parent.iterdir()] == []


KILLED = """
import os, signal, sys, time
from pathlib import Path
from tav_opt.files import whole
with whole(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("amid", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tav_opt.files._BESIDE_SECONDS", 0.0)
    writers = []
    for name in ("killed", "living"):
        command = [sys.executable, "-c", KILLED, str(tmp_path / name)]
        writers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert writers[-1].stdout.readline() == "amid\n"
    killed, living = writers
    killed.kill()
    killed.wait()
    left = {path.parent for path in tmp_path.glob(".new-*/killed")}
    assert len(left) == 1
    with whole(tmp_path / "third") as temporary:
        temporary.write_text("whole")
    assert not left & set(tmp_path.iterdir()) and list(tmp_path.glob(".new-*/living"))
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [str(*left)]
    living.kill()
    living.wait()


def test_what_a_killed_export_left_is_swept_by_the_next(exported, repository, caplog):
    folder = clip_of(repository).parent
    for name in (".second.fresh", ".third.old", ".first.old"):
        (folder / name).mkdir()
    (folder.parent / "base" / ".half.fresh").mkdir()
    assert clips.verify(repository) == []
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert not (folder.parent / "base" / ".half.fresh").exists()
    assert len([record for record in caplog.records if "swept" in record.getMessage()]) == 4


def test_a_state_that_is_none_is_one_line(tuned):
    from tav_opt import tuning_state

    for metadata in (None, {"settings": "[]", "extra": "{}"}, {"settings": "{", "extra": "{}"}):
        save_file({"losses": torch.zeros(1)}, tuned / tuning_state.STATE, metadata)
        with pytest.raises(InputError, match="is no state of a tuning run"):
            tuning_state.load(tuned, {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_output_that_is_full_is_one_line(repository):
    code = "import sys; from tav_opt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "clips", "list", "--repository", str(repository)]
    with open("/dev/full", "w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (2, "tav-opt clips: No space left on device\n")


NO_THREADS = """
import sys, threading
def start(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
from tav_opt.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_too_few_threads_are_one_line_that_blames_no_file(tuned, tmp_path):
    command = [
        sys.executable,
        "-c",
        NO_THREADS,
        "edit",
        str(tuned),
        "--prompt",
        "a cat",
        "--out",
        str(tmp_path / "e.mp4"),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    line = "tav-opt edit: RuntimeError: can't start new thread (--debug shows where)\n"
    assert (run.returncode, run.stderr.splitlines(keepends=True)[-1]) == (1, line)
    assert "Traceback" not in run.stderr and not (tmp_path / "e.mp4").exists()


def test_the_examples_are_right_without_their_lies(tuned, repository):
    """So that each refusal above is of what is named there."""
    assert asdict(checkpoint.load(tuned).info)["frames"] == 4
    assert read_json(clip_of(repository) / "manifest.json")["frames"] == 4
    assert registry.load(clip_of(repository)).kind == "onnxruntime"
