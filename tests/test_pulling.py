"""Model repositories fetched from elsewhere: whole, once, never altered; fsspec's own stores stand for all others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
from exported import FRAMES, Exported, export_once, write_other
from hub import serving

from tav_opt.cli import main
from tav_opt.config import InputError
from tav_opt.engines.registry import open_clip
from tav_opt.export import exporting
from tav_opt.repository import clips, pulling
from tav_opt.repository.layout import hashes
from tav_opt.repository.pulling import pull

VERSION = Path("tune_a_video_stream") / "1"


@pytest.fixture(scope="module")
def there(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two clips on one base, and engines of the base."""
    exported: Exported = export_once(golden, tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("there")
    exporting.add(write_other(exported, folder), exported.repository, name="second")
    engines = next((exported.repository / VERSION / "base").iterdir()) / "engines" / "sm_90-fp16"
    engines.mkdir(parents=True)
    (engines / "unet.engine").write_bytes(b"made elsewhere")
    (engines / "manifest.json").write_text(json.dumps({"made_of": {}, "files": hashes(engines)}))
    return exported.repository


@pytest.fixture
def bucket(there: Path) -> str:
    """The same in a store that is no folder."""
    store = fsspec.filesystem("memory")
    store.put(f"{there}/", "/bucket/clips/", recursive=True)
    yield "memory://bucket/clips"
    store.rm("/bucket", recursive=True)


def content(repository: Path) -> dict[str, bytes]:
    paths = (path for path in repository.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(repository)): path.read_bytes() for path in paths}


def test_what_is_pulled_is_the_same_repository_and_edits(bucket, there, tmp_path, capsys):
    assert main(["clips", "pull", bucket, "--repository", str(tmp_path / "here")]) == 0
    base = next((there / VERSION / "base").iterdir())
    told = capsys.readouterr().out
    assert [line.split(":")[0] for line in told.splitlines()] == [
        f"base/{base.name}", f"base/{base.name}/engines/sm_90-fp16", "clips/first", "clips/second",
    ]  # fmt: skip
    assert told.count("fetched") == 4 and content(tmp_path / "here") == content(there)
    assert clips.verify(tmp_path / "here") == []
    assert open_clip(tmp_path / "here", "second", threads=1).info.frames == FRAMES


def test_only_what_is_another_is_fetched_again_and_what_is_not_there_stays(bucket, there, tmp_path):
    here = tmp_path / "here"
    pull(f"file://{there}", here)
    shutil.copytree(here / VERSION / "clips" / "first", here / VERSION / "clips" / "own")
    values = here / VERSION / "clips" / "second" / "values.safetensors"
    values.write_bytes(values.read_bytes()[:-1])
    told = []
    found = pull(bucket, here, told.append)
    assert found == told and [one.name for one in found if one.size] == ["clips/second"]
    assert {clip.name for clip in clips.clips(here)} == {"first", "second", "own"}
    assert values.read_bytes() == (there / VERSION / "clips" / "second" / "values.safetensors").read_bytes()


@pytest.mark.parametrize("inside", ["", "/served/clips"])
def test_a_repository_on_the_hub_is_pulled_as_from_a_store(there, tmp_path, inside):
    with serving(tmp_path) as hub:
        shutil.copytree(there, hub.root / f"clips{inside}")
        pull(f"hf://owner/clips{inside}", tmp_path / "here")
        assert content(tmp_path / "here") == content(there)
        with pytest.raises(InputError, match=r"hf://owner/other"):
            pull("hf://owner/other", tmp_path / "here")


@pytest.mark.parametrize("harm", ["altered", "absent"])
def test_what_is_altered_there_takes_no_place(bucket, there, tmp_path, harm):
    store, path = fsspec.filesystem("memory"), f"/bucket/clips/{VERSION}/clips/second/values.safetensors"
    if harm == "absent":
        store.rm(path)
    else:
        store.pipe(path, store.cat(path)[:-1] + b"x")
    with pytest.raises(InputError, match=r"clips/second/values.safetensors is not what its|memory://.*FileNotFound"):
        pull(bucket, tmp_path)
    assert {path.parent.name for path in (tmp_path / VERSION / "clips").glob("*/manifest.json")} == {"first"}
    assert not list((tmp_path / VERSION / "clips").glob(".*second*"))


@pytest.mark.parametrize("name", ["../../../outside", "/etc/passwd", "a/b"])
def test_a_manifest_that_names_files_elsewhere_is_refused(bucket, tmp_path, name):
    store, path = fsspec.filesystem("memory"), f"/bucket/clips/{VERSION}/clips/first/manifest.json"
    manifest = json.loads(store.cat(path))
    store.pipe(path, json.dumps({**manifest, "files": {name: "0" * 64}}).encode())
    with pytest.raises(InputError, match=r"clips/first/manifest\.json: files"):
        pull(bucket, tmp_path / "here")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nowhere", "'nowhere' is no URL, as s3://bucket/folder"),
        ("memory://nothing", "memory://nothing holds no model repository with clips"),
        ("file:///nothing/here", "holds no model repository with clips"),
        ("gopher://x/y", "gopher://x/y: Protocol not known: gopher"),
        ("hf://x", "hf://x"),
    ],
)
def test_urls_that_hold_nothing_are_one_line_and_leave_nothing(url, words, tmp_path, capsys):
    assert main(["clips", "pull", url, "--repository", str(tmp_path / "here")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and words in told
    assert not content(tmp_path)


def test_the_manifest_that_was_looked_through_is_the_one_that_is_installed(bucket, there, tmp_path, monkeypatch):
    """Somebody replaces it right after it was read."""
    fetch, path = pulling._Source.fetch, f"{VERSION}/clips/second/manifest.json"

    def replaced_then(source, folder, name, here):
        fetch(source, folder, name, here)
        if (folder, name) == ("clips/second", "manifest.json"):
            fsspec.filesystem("memory").pipe(f"/bucket/clips/{path}", b'{"files": {"../../x": "no hash"}}')

    monkeypatch.setattr(pulling._Source, "fetch", replaced_then)
    pull(bucket, tmp_path)
    assert (tmp_path / path).read_bytes() == (there / path).read_bytes()


def test_a_base_that_is_fetched_again_keeps_the_engines_that_were_built_here(bucket, there, tmp_path):
    pull(bucket, tmp_path)
    base = next((tmp_path / VERSION / "base").iterdir())
    shutil.copytree(base / "engines" / "sm_90-fp16", base / "engines" / "own")
    (base / "engines" / ".left.fresh").mkdir()
    manifest = json.loads((base / "manifest.json").read_text())
    (base / "manifest.json").write_text(json.dumps({**manifest, "versions": {}}))
    assert [one.name for one in pull(bucket, tmp_path) if one.size] == [f"base/{base.name}"]
    assert {path.name for path in (base / "engines").iterdir()} == {".lock", "own", "sm_90-fp16"}
    shutil.rmtree(base / "engines" / "own")
    assert content(tmp_path) == content(there)


def test_of_a_base_that_got_a_graph_the_graph_alone_is_fetched(bucket, there, tmp_path, monkeypatch):
    pull(bucket, tmp_path)
    base, fetch, fetched = next((there / VERSION / "base").iterdir()).name, pulling._Source.fetch, []
    store, folder = fsspec.filesystem("memory"), f"/bucket/clips/{VERSION}/base/{base}"
    manifest = json.loads(store.cat(f"{folder}/manifest.json"))
    store.pipe(f"{folder}/unet_more.onnx", b"a graph")
    graph = next(one for one in manifest["graphs"] if one["name"] == "unet") | {"name": "unet_more"}
    added = {"graph": graph, "files": {"unet_more.onnx": hashlib.sha256(b"a graph").hexdigest()}}
    store.pipe(f"{folder}/manifest.json", json.dumps({**manifest, "added": {"unet_more": added}}).encode())

    def counted(source, folder, name, here):
        fetched.append(name)
        fetch(source, folder, name, here)

    monkeypatch.setattr(pulling._Source, "fetch", counted)
    (one,) = [one for one in pull(bucket, tmp_path) if one.size]
    assert {*fetched} == {"manifest.json", "unet_more.onnx"}
    assert one.size == len(store.cat(f"{folder}/manifest.json")) + len(b"a graph")
    assert clips.verify(tmp_path) == [] and (tmp_path / VERSION / "base" / base / "unet_more.onnx").is_file()


@pytest.mark.parametrize("state", ["fresh", "old"])
def test_what_a_killed_pull_left_among_engines_is_swept(bucket, there, tmp_path, state):
    pull(bucket, tmp_path)
    engines = next((tmp_path / VERSION / "base").iterdir()) / "engines"
    (engines / "sm_90-fp16" / "unet.engine").write_bytes(b"damaged")
    (engines / f".sm_90-fp16.{state}").mkdir()
    (engines / f".sm_90-fp16.{state}" / "unet.engine").write_bytes(b"half")
    assert [one.name for one in pull(bucket, tmp_path) if one.size] == [
        f"base/{engines.parent.name}/engines/sm_90-fp16"
    ]
    assert content(tmp_path) == content(there)


def test_a_store_whose_library_is_absent_says_which(monkeypatch, tmp_path):
    def absent(_url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", absent)
    with pytest.raises(InputError, match="s3://bucket/x: Install s3fs to access S3"):
        pull("s3://bucket/x", tmp_path)


def test_a_pull_that_is_killed_leaves_what_was_there(bucket, there, tmp_path, monkeypatch):
    here = tmp_path / "here"
    pull(bucket, here)
    manifest = here / VERSION / "clips" / "second" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("skiing", "walking"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            pull(bucket, here)
    assert "walking" in manifest.read_text()
    assert [one.name for one in pulling.pull(bucket, here) if one.size] == ["clips/second"]
    assert content(here) == content(there)
