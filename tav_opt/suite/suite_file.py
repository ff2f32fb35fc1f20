"""`suite.yaml`: videos, captions, edits, settings and methods of one evaluation (docs/suite.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast, get_args

from tav_opt import editing
from tav_opt.config import (
    CONTROL_SETTINGS,
    ClipConfig,
    EditConfig,
    InputError,
    MetricsConfig,
    PathLike,
    TrainConfig,
    check_numbers,
    check_text,
)
from tav_opt.reference import as_declared, check_keys, made, read_yaml
from tav_opt.suite import manifests
from tav_opt.suite.suite_types import Attention, Category, Kind, Method, Suite, SuiteEdit, SuiteVideo, numbered

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}\Z")

_SUITE = {"model", "clip", "tune", "edit", "metrics", "captioner", "videos", "manifest", "methods"}
_VIDEO = {"name", "video", "caption", "edits", "mask", "clip"}
_MANIFEST = {"kind", "file", "folder", "masks"}
_METHOD = {"kind", "folder", "tune", "edit", "attention"}


def read_suite(path: PathLike) -> Suite:
    """Reads a suite's YAML file; paths in it are seen from its folder.

    Raises InputError, naming key and value, for keys that are unknown or missing, values of the wrong kind, two of one
    name, an edit without prompt, and a method whose settings do nothing. Whether files are there is `missing_files`'.
    """
    path = Path(path)
    found = read_yaml(path)
    try:
        return _suite(found, path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _suite(found: dict[str, Any], path: Path) -> Suite:
    check_keys(found, _SUITE, ("model",))
    home = path.absolute().parent
    if ("videos" in found) == ("manifest" in found):
        raise InputError("give either videos or a manifest")
    clip = _section(found, "clip", ClipConfig, without=("video",))
    if "manifest" in found:
        videos = _of_manifest(_mapping("manifest", found["manifest"]), home, clip)
    else:
        videos = _videos(found["videos"], home, clip)
    common = {name: _section(found, name, kind, without=left) for name, kind, left in _SETTINGS}
    methods = _methods(found.get("methods", {"ours": {}}), home, common)
    idle = [key for key in _OF_VIDEOS if key in common["edit"]]
    if idle and all(method.kind != "tune-a-video" for method in methods):
        raise InputError(f"edit.{idle[0]} does nothing: no method is of kind tune-a-video")
    metrics = made(MetricsConfig, _section(found, "metrics", MetricsConfig, without=("device",)))
    check_numbers(metrics)
    captioner = found.get("captioner")
    suite = Suite(
        file=path,
        model=_place(as_declared(str, "model", found["model"]), home),
        videos=tuple(videos),
        methods=methods,
        metrics=_placed(metrics, home),
        captioner=None if captioner is None else _place(as_declared(str, "captioner", captioner), home),
    )
    _check(suite)
    return suite


_SETTINGS = (
    ("tune", TrainConfig, ("preview_every", "preview_prompts", "keep_state")),
    ("edit", EditConfig, ("prompts", "inversion_steps", "controls", "control_inversion")),
)
"""Sections that methods may have too, and fields that they lack: previews are for a person who waits, the steps of
the inversion are those of tuning, and controls need maps of each video."""
_FRAME_BY_FRAME = ("per-frame", "plug-and-play")
"""Kinds of methods that know no video."""
_OF_VIDEOS = ("inversion_iterations", "reuse_interval", *CONTROL_SETTINGS)
"""Settings of edits that do nothing for them."""
_NETWORKS = ("clip", "pick_score", "dino")


def _section(found: dict[str, Any], name: str, kind: type, *, without: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a section, their names known; values are looked at when they are put together."""
    section = _mapping(name, found.get(name) or {})
    check_keys(section, {f.name for f in fields(kind)} - set(without), (), f"{name}.")
    return section


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name}: {value!r} is not settings (key: value)")
    return value


def _place(model: str, home: Path) -> str:
    """A folder or file beside the suite's file, where there is one of that name; else a hub id as it stands."""
    path = home / Path(model).expanduser()
    return str(path) if path.exists() else model


def _placed(metrics: MetricsConfig, home: Path) -> MetricsConfig:
    found: dict[str, Any] = {n: _place(v, home) for n in _NETWORKS if (v := getattr(metrics, n)) is not None}
    return replace(metrics, **found)


def _videos(found: Any, home: Path, clip: Mapping[str, Any]) -> list[SuiteVideo]:
    if not isinstance(found, list) or not found:
        raise InputError(f"videos: {found!r:.60} is not a list of one or more")
    return [_video(entry, number, home, clip) for number, entry in enumerate(found, start=1)]


def _video(entry: Any, number: int, home: Path, clip: Mapping[str, Any]) -> SuiteVideo:
    where = f"videos[{number}]"
    entry = _mapping(where, entry)
    check_keys(entry, _VIDEO, ("video", "edits"), f"{where}.")
    path = home / as_declared(Path, f"{where}.video", entry["video"])
    name = as_declared(str, f"{where}.name", entry.get("name", path.stem))
    own = {**clip} | _section(entry, "clip", ClipConfig, without=("video",))
    caption = entry.get("caption")
    given = entry["edits"]
    if not isinstance(given, list):
        raise InputError(f"{name}: edits: {given!r:.60} is not a list")
    edits = [_edit(edit, f"{name}: edits[{index}]") for index, edit in enumerate(given, start=1)]
    mask = entry.get("mask")
    return SuiteVideo(
        name=name,
        clip=made(ClipConfig, {"video": str(path), **own}),
        caption=None if caption is None else as_declared(str, f"{name}: caption", caption),
        edits=numbered(edits),
        mask=None if mask is None else home / as_declared(Path, f"{name}: mask", mask),
    )


def _edit(entry: Any, where: str) -> SuiteEdit:
    if isinstance(entry, str):
        entry = {"prompt": entry}
    entry = _mapping(where, entry)
    check_keys(entry, {"prompt", "category", "name"}, ("prompt",), f"{where}.")
    category = entry.get("category", "mixed")
    return SuiteEdit(
        name=as_declared(str, f"{where}.name", entry.get("name", "")),
        prompt=as_declared(str, f"{where}.prompt", entry["prompt"]),
        category=as_declared(Category, f"{where}.category", category),
    )


def _of_manifest(found: dict[str, Any], home: Path, clip: Mapping[str, Any]) -> list[SuiteVideo]:
    check_keys(found, _MANIFEST, ("kind", "file", "folder"), "manifest.")
    if found["kind"] not in manifests.READERS:
        raise InputError(f"manifest.kind: {found['kind']!r} is not {', '.join(manifests.READERS)}")
    masks = found.get("masks")
    return manifests.read(
        found["kind"],
        home / as_declared(Path, "manifest.file", found["file"]),
        home / as_declared(Path, "manifest.folder", found["folder"]),
        None if masks is None else home / as_declared(Path, "manifest.masks", masks),
        lambda video: made(ClipConfig, {"video": str(video), **clip}),
    )


def _methods(found: Any, home: Path, common: dict[str, dict[str, Any]]) -> tuple[Method, ...]:
    if isinstance(found, list):
        if twice := _twice([str(name) for name in found]):
            raise InputError(f"methods: two of the name {twice}")
        found = dict.fromkeys(found)
    found = _mapping("methods", found)
    if not found:
        raise InputError("methods: give one or more")
    return tuple(_method(str(name), settings or {}, home, common) for name, settings in found.items())


def _method(name: str, settings: Any, home: Path, common: dict[str, dict[str, Any]]) -> Method:
    where = f"methods.{name}"
    settings = _mapping(where, settings)
    check_keys(settings, _METHOD, (), f"{where}.")
    usual = name if name in get_args(Kind) else "folder" if "folder" in settings else "tune-a-video"
    kind = as_declared(Kind, f"{where}.kind", settings.get("kind", usual))
    used = {"tune-a-video": {"tune", "edit", "attention"}, "folder": {"folder"}}.get(kind, {"edit"}) | {"kind"}
    if idle := [key for key in settings if key not in used]:
        raise InputError(f"{where}.{idle[0]} does nothing for a method of kind {kind}")
    if kind == "folder" and "folder" not in settings:
        raise InputError(f"key {where}.folder is missing")
    if kind in _FRAME_BY_FRAME and (idle := [key for key in _OF_VIDEOS if key in (settings.get("edit") or {})]):
        raise InputError(f"{where}.edit.{idle[0]} does nothing for a method of kind {kind}")
    own = {n: common[n] | _section(settings, n, k, without=left) for n, k, left in _SETTINGS}
    attention = as_declared(Attention, f"{where}.attention", settings.get("attention", "sparse-causal"))
    return Method(
        name=name,
        kind=cast(Kind, kind),
        tune=made(TrainConfig, own["tune"]),
        edit=made(EditConfig, own["edit"]),
        attention=cast(Attention, attention),
        folder=home / as_declared(Path, f"{where}.folder", settings["folder"]) if "folder" in settings else None,
    )


def _twice(names: list[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _check(suite: Suite) -> None:
    """What no part can see alone: names, prompts, numbers."""
    for what, names in (("videos", [v.name for v in suite.videos]), ("methods", [m.name for m in suite.methods])):
        check_names(what, names)
    for video in suite.videos:
        check_numbers(video.clip)
        if not video.edits:
            raise InputError(f"{video.name}: edits: give one or more")
        check_names(f"{video.name}: edits", [edit.name for edit in video.edits])
        for text in (video.caption, *(edit.prompt for edit in video.edits)):
            if text is not None and not text.strip():
                raise InputError(f"{video.name}: caption or prompt {text!r} is empty: say what is shown")
            check_text(f"{video.name}: prompt", text or "")
        if video.caption is None and suite.captioner is None:
            raise InputError(f"{video.name} has no caption: give one, or a captioner for all that have none")
    for method in suite.methods:
        check_numbers(method.tune)
        try:
            editing.check(replace(method.edit, prompts=("a prompt",)))  # prompts are the edits', looked at above
        except InputError as error:
            raise InputError(f"{method.name}: {error}") from None
        if method.tune.warmup > method.tune.steps:
            raise InputError(f"{method.name}: warmup {method.tune.warmup} is more than the {method.tune.steps} steps")


def check_names(what: str, names: list[str]) -> None:
    """Raises InputError for a name that is none for a folder, and for two that are alike."""
    for name in names:
        if not NAME.match(name):
            raise InputError(f"{what}: name {name!r:.110} is not 1 to 60 letters, digits, '_', '-' and '.'")
    if twice := _twice([name.lower() for name in names]):  # some file systems know no other difference
        raise InputError(f"{what}: two of the name {twice}")
