"""What a path leads to is found, checked, read and hashed once, and then travels as a value."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from exported import Exported, export_once

import tav_opt
from tav_opt import checkpoint, cli
from tav_opt.engines import registry
from tav_opt.export import exporting
from tav_opt.files import read_json
from tav_opt.repository.layout import info_of

PACKAGE = Path(tav_opt.__file__).parent


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[tuple[str, str]]]]:
    """How often a path comes into a file of the package from another one, and what functions get which path."""
    into: Counter[str] = Counter()
    given: Counter[tuple[str, str]] = Counter()

    def note(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)):
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        paths = [str(value) for name in names if isinstance(value := frame.f_locals.get(name), Path)]
        given.update((code.co_name, path) for path in paths)
        if paths and frame.f_back is not None and frame.f_back.f_code.co_filename != code.co_filename:
            into[str(Path(code.co_filename).relative_to(PACKAGE))] += 1

    sys.setprofile(note)
    try:
        yield into, given
    finally:
        sys.setprofile(None)


def often(given: Counter[tuple[str, str]], name: str) -> dict[str, int]:
    """How often each path was given to functions of a name."""
    return {path: count for (function, path), count in given.items() if function == name}


def test_an_edit_looks_at_each_path_once(exported, tmp_path):
    base = Path(info_of(exported.version / "clips" / "first").base)
    with counted() as (into, given):
        options = ["--prompt", "x", "--steps", "1", "--out", str(tmp_path / "edit.gif")]
        assert cli.main(["edit", str(exported.checkpoint), *options]) == 0
    assert (into["models.py"], into["checkpoint.py"]) == (0, 0), "a Base and a ClipFolder come, no paths"
    assert often(given, "check")[str(base)] == 1
    read, hashed = often(given, "read_json"), often(given, "sha256")
    configs = {str(base / part / "config.json") for part in ("unet", "vae", "text_encoder")}
    assert {*configs, str(exported.checkpoint / "checkpoint.json")} <= set(read) and set(read.values()) == {1}
    assert configs <= set(hashed) and set(hashed.values()) == {1}


def test_a_base_that_pytorch_serves_is_hashed_once(exported):
    with counted() as (_, given):
        registry.open_clip(exported.repository, "first", engine="pytorch", device=torch.device("cpu"))
    base = info_of(exported.version / "clips" / "first").base
    hashed = {path: count for path, count in often(given, "sha256").items() if path.startswith(base)}
    assert len(hashed) > 3 and set(hashed.values()) == {1}


def test_an_exported_clip_is_opened_without_diffusers(exported):
    code = (
        "import sys, tav_opt\n"
        f"engine = tav_opt.load({str(exported.version / 'clips' / 'first')!r})\n"
        "print(engine.kind, *{'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.stdout.split() == ["onnxruntime"], done.stderr


def test_an_exported_clip_is_a_checkpoint(exported, tmp_path):
    clip = exported.version / "clips" / "first"
    again, tuned = checkpoint.load(clip), checkpoint.load(exported.checkpoint)
    assert again.info == tuned.info and checkpoint.is_checkpoint(clip)
    assert all(torch.equal(again.values[name], value) for name, value in tuned.values.items())
    assert torch.equal(again.inverted_latents, tuned.inverted_latents)
    copied = exporting.export(clip, exported.repository, name="copied")
    assert read_json(copied / "manifest.json") == read_json(clip / "manifest.json")
    assert not checkpoint.is_checkpoint(exported.base), "whose manifest is of another kind"
