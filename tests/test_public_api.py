"""What a program meets: every path as text or os.PathLike, one text as one prompt, help() that tells the fields."""

from __future__ import annotations

import inspect
import pydoc
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any

import numpy as np
import pytest
import torch
from exported import Exported, export_once
from fakes import FakeEngine

import tav_opt
from tav_opt import checkpoint, config, models, reference, video
from tav_opt.base.directory import Base, checked_base
from tav_opt.client import AsyncClient, Client, Tls, exchange
from tav_opt.config import ClipConfig, EditConfig, InputError, TrainConfig, WorkerConfig
from tav_opt.contract import from_tensors
from tav_opt.engines import registry
from tav_opt.export import exporting
from tav_opt.metrics import clip_encoder, embeddings, measuring, structure_distance
from tav_opt.repository import clips, layout
from tav_opt.serving.host.serve_config import ServeConfig
from tav_opt.video import masks


class Somewhere:
    """An os.PathLike that is no pathlib.Path: what other packages pass around."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


kinds = pytest.mark.parametrize("kind", [str, Somewhere], ids=["str", "PathLike"])

# Paths.

MODULES = (checkpoint, clips, models, reference, video, embeddings, masks, measuring)
"""Whose functions docs name, or others' code imports."""


def functions() -> Iterator[Callable]:
    yield from (layout.find_clip, layout.version_folder, registry.open_clip, exporting.add)
    yield from (clip_encoder.ClipEncoder.open, structure_distance.Vit.open)
    for name in tav_opt.__all__:
        found = getattr(tav_opt, name)
        yield from (found,) if inspect.isfunction(found) else public(vars(found).values(), found.__module__)
    for module in MODULES:
        yield from public(vars(module).values(), module.__name__)


def public(found: Any, module: str) -> Iterator[Callable]:
    for item in found:
        if inspect.isfunction(item) and item.__module__ == module and not item.__name__.startswith("_"):
            yield item


def hints(function: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(function))
    except NameError:  # of names for type checking alone
        return {}


def is_a_path_alone(hint: Any) -> bool:
    """Whether pathlib.Path is taken, and text is not."""
    either = set(typing.get_args(hint)) if isinstance(hint, UnionType) or typing.get_origin(hint) else {hint}
    return Path in either and str not in either


def test_no_public_function_takes_pathlib_alone():
    taken = [
        f"{function.__module__}.{function.__qualname__}({name})"
        for function in functions()
        for name, hint in hints(function).items()
        if name != "return" and is_a_path_alone(hint)
    ]
    assert not taken


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory) -> Exported:
    return export_once(golden, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def sd(shallow) -> Path:
    return shallow


@kinds
def test_every_function_that_reads_takes_paths_of_any_kind(kind, exported, sd, tmp_path):
    at, repo, base = kind(exported.checkpoint), kind(exported.repository), kind(sd)
    assert tav_opt.load(at).info == tav_opt.load(at, base=base).info == checkpoint.load(at).info
    assert checkpoint.is_checkpoint(at) and not checkpoint.is_checkpoint(base)
    assert checkpoint.load_tensors(kind(exported.checkpoint / "values.safetensors"))
    assert checked_base(base, Base.at(base).hash).path == sd == models.resolve(base)
    assert Base.at(base).native_size == 8 * Base.at(base).vae_factor
    assert models.load_video_unet(at).dtype == models.load(base).unet.dtype
    assert [clip.name for clip in clips.clips(repo)] == ["first"]
    assert layout.version_folder(repo) == exported.version and clips.verify(repo) == []
    assert registry.open_clip(repo, "first").info == checkpoint.load(at).info
    assert layout.find_clip(repo, "first") == exported.version / "clips" / "first"
    assert tav_opt.load(kind(exported.version / "clips" / "first")).info == checkpoint.load(at).info
    (tmp_path / "own.yaml").write_text("{model: sd, prompt: a dog, video: v.mp4}")
    assert reference.read_reference_config(kind(tmp_path / "own.yaml")).prompt == "a dog"
    with pytest.raises(InputError, match=r"neither|no directory"):
        models.resolve(kind(tmp_path / "nowhere"))


@kinds
def test_every_function_that_writes_takes_paths_of_any_kind(kind, exported, sd, tmp_path):
    video.write(kind(tmp_path / "clip.mp4"), exported.frames, 8)
    assert len(video.read(kind(tmp_path / "clip.mp4")).frames) == len(exported.frames)
    video.write_encoded(kind(tmp_path / "again.mp4"), (tmp_path / "clip.mp4").read_bytes())
    checkpoint.save(checkpoint.load(exported.checkpoint), kind(tmp_path / "saved"), settings={})
    checkpoint.save_tensors({"x": torch.ones(1)}, kind(tmp_path / "x.safetensors"))
    assert checkpoint.load_tensors(tmp_path / "x.safetensors")["x"] == 1
    saved, repo = kind(tmp_path / "saved"), kind(exported.repository)
    assert tav_opt.export_clip(saved, repo, name="own", base=kind(sd)).name == "own"
    assert exporting.add(saved, repo, base=kind(sd)).clip.name == "saved"
    assert clips.remove(repo, ["own"]) == []
    assert clips.remove(repo, "saved") == [], "one name is one clip"


@kinds
def test_tune_takes_paths_of_any_kind(kind, exported, sd, tmp_path):
    clip = video.Clip(frames=exported.frames, fps=8)
    with pytest.raises(InputError, match="holds a finished checkpoint"):
        tav_opt.tune(kind(sd), clip, "x", TrainConfig(), kind(exported.checkpoint))
    with pytest.raises(InputError, match=f"model '{tmp_path}/nowhere' is neither"):
        tav_opt.tune(kind(tmp_path / "nowhere"), clip, "x", TrainConfig(), kind(tmp_path / "ckpt"))


@kinds
def test_fields_that_hold_paths_take_any_kind(kind):
    at = kind(Path("a/b"))
    assert ClipConfig(video=at).video == WorkerConfig(cache=at).cache == Path("a/b")
    tls = Tls(root_certificates=at, certificate=at, key=at)
    assert {tls.root_certificates, tls.certificate, tls.key} == {Path("a/b")}
    serve = ServeConfig(repository=at, tls_certificate=at, tls_key=at, tls_client_ca=at, tritonserver=at)
    assert {getattr(serve, f.name) for f in fields(serve) if "Path" in str(f.type)} == {Path("a/b")}


# Prompts.


class Counting(FakeEngine):
    """Says which prompts it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def encode_text(self, prompts):
        self.asked += prompts
        return super().encode_text(prompts)


@pytest.mark.parametrize(
    "given, expected",
    [("cat", ("cat",)), (["cat"], ("cat",)), (("cat", "dog"), ("cat", "dog")), (iter(["cat", "dog"]), ("cat", "dog"))],
)
def test_one_text_is_one_prompt_wherever_settings_are_made(given, expected):
    assert EditConfig(prompts=given).prompts == expected


def test_one_text_is_one_of_whatever_may_be_several():
    train = TrainConfig(preview_prompts="a cat", trainable="attn_temp")
    assert (train.preview_prompts, train.trainable) == (("a cat",), ("attn_temp",))


@pytest.mark.parametrize("wrong", [b"cat", 5, ["cat", None], [b"cat"]])
def test_what_is_no_text_is_refused_with_its_value(wrong):
    with pytest.raises(InputError, match="prompts") as caught:
        EditConfig(prompts=wrong)
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("given", ["a panda", ["a panda"], EditConfig(prompts=("a panda",))])
def test_edit_takes_what_the_client_takes(given):
    engine = Counting()
    assert tav_opt.edit(engine, given).shape == (1, 2, 8, 8, 3)
    assert engine.asked == ["", "a panda"]


@pytest.mark.parametrize("given", ["a panda", ["a panda"], EditConfig(prompts="a panda")])
def test_clients_send_one_text_as_one_prompt(given, monkeypatch):
    """Both clients make their requests there."""
    sent = []
    kept = lambda _model, tensors: (sent.append(tensors), SimpleNamespace())[1]  # noqa: E731
    monkeypatch.setattr(exchange, "_message", kept)
    exchange.Exchange.of("toy", given, {}, exchange.Retry())
    assert from_tensors(sent[0]).edit.prompts == ("a panda",)


@pytest.mark.parametrize("yaml", ["prompts: a cat", "preview_prompts: a cat\npreview_every: 5", "trainable: attn_temp"])
def test_one_text_in_yaml_is_one(yaml, tmp_path):
    (tmp_path / "own.yaml").write_text(f"model: sd\nprompt: a dog\nvideo: v.mp4\n{yaml}\n")
    found = reference.read_reference_config(tmp_path / "own.yaml")
    kept = {**{"prompts": found.edit.prompts}, **{f.name: getattr(found.train, f.name) for f in fields(TrainConfig)}}
    name, _, value = yaml.splitlines()[0].partition(": ")
    assert kept[name] == (value,)


def test_one_text_in_the_references_yaml_is_one(tmp_path):
    text = "{pretrained_model_path: sd, output_dir: o, train_data: {video_path: v, prompt: x}, validation_data: {%s}}"
    (tmp_path / "theirs.yaml").write_text(text % "prompts: a cat")
    assert reference.read_reference_config(tmp_path / "theirs.yaml").edit.prompts == ("a cat",)


def test_engines_take_one_text(exported):
    eager, exported_ = tav_opt.load(exported.checkpoint), registry.open_clip(exported.repository, "first")
    for engine in (eager, exported_):
        assert torch.equal(engine.encode_text("a panda"), engine.encode_text(["a panda"]))


# What is seen of it.


def test_dir_lists_what_the_package_offers():
    assert set(tav_opt.__all__) | {"__version__"} <= set(dir(tav_opt))
    assert {"Client", "AsyncClient", "Retry", "ServerError", "Tls"} <= set(tav_opt.__all__), "docs name them"


def documented() -> list[type]:
    offered = [getattr(tav_opt, name) for name in tav_opt.__all__]
    other = [*vars(config).values(), *vars(tav_opt.client).values(), checkpoint.Checkpoint]
    return list({item: None for item in [*offered, *other] if is_dataclass(item) and fields(item)})


@pytest.mark.parametrize("kind", documented(), ids=lambda kind: kind.__name__)
def test_help_tells_what_each_field_means(kind):
    text = pydoc.plain(pydoc.render_doc(kind))
    said = [line.strip().strip('"') for line in inspect.getsource(kind).splitlines() if line.startswith('    """')]
    assert said and not [line for line in said if line not in text]
    assert not [f.name for f in fields(kind) if f"{f.name}: " not in text.partition("Attributes:")[2]], "undocumented"


def test_help_of_edits_is_readable():
    text = pydoc.plain(pydoc.render_doc(EditConfig))
    assert "How an edit is sampled (paper section 4.2)." in text
    assert "eta: 0: deterministic DDIM; 1: as much noise as DDPM." in text


def test_faces_of_both_clients_agree():
    for name in ("edit", "stream"):
        both = [inspect.signature(getattr(kind, name)).parameters for kind in (Client, AsyncClient)]
        assert list(both[0]) == list(both[1])


def test_frames_are_edited_in_the_clips_place():
    engine = Counting()
    tav_opt.edit(engine, "a panda", frames=np.zeros((2, 8, 8, 3), np.uint8))
    assert len(engine.encoded) == 1
