"""Shares a tuned clip on the Hugging Face hub: its own files, a card, and nothing of the machine it was tuned on."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from tav_opt.clip_folder import ClipFolder
from tav_opt.config import Config, InputError, PathLike, documented, first_line
from tav_opt.files import DESCRIPTION, altered, open_plain, write_json

SHOWN = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4")
OWN = ("preview.png", "loss.png")
"""What tuning leaves to look at."""
MAX_PICTURE_BYTES = 20 << 20
_LICENCE = (
    "The licence of the base model holds for what is made with it; the clip that it was tuned on may have an owner too."
)


@documented
@dataclass(frozen=True, kw_only=True)
class CardConfig(Config):
    """What a model card says that the checkpoint does not know."""

    base: str | None = None
    """Hub id of the base model, where the clip was tuned on a folder."""
    license: str | None = None
    """By the hub's name for it."""
    pictures: tuple[Path, ...] = ()
    """Files to show."""


def push(
    checkpoint: PathLike,
    hub_id: str,
    card: CardConfig = CardConfig(),
    *,
    private: bool = False,
) -> str:
    """Uploads a tuned clip in one commit → its address. `tav-opt edit HUB_ID` and `export` take it from there.

    The repository is made where it is not there. Raises InputError for what is no whole checkpoint, for a bad id or
    picture, and with the hub's reason where it refuses.
    """
    _check_id(hub_id, "hub id")
    if card.base is not None:
        _check_id(card.base, "base")
    clip = ClipFolder.at(checkpoint)
    if changed := altered(clip.path, clip.description.get("files", {})):
        raise InputError(f"{clip.path / changed[0]} is missing or altered: it is not what {clip.file} describes")
    shown = _pictures(clip, card)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        described = public(clip, card)
        write_json(folder / DESCRIPTION, described)
        for path in (*(clip.path / name for name in described["files"]), *shown):
            shutil.copyfile(path, folder / path.name)
        (folder / "README.md").write_text(written_card(hub_id, described, [path.name for path in shown], card))
        return _uploaded(folder, hub_id, private)


def _check_id(hub_id: str, name: str) -> None:
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise InputError(f"{name} {hub_id!r} is not owner/name: {first_line(error)}") from None
    if hub_id.count("/") != 1:
        raise InputError(f"{name} {hub_id!r} is not owner/name")


def _pictures(clip: ClipFolder, card: CardConfig) -> list[Path]:
    """The given ones first, in the place of the run's own where those have their names.

    Raises InputError for what a card cannot show, and for two given ones of one name.
    """
    found: dict[str, Path] = {}
    for path in card.pictures:
        with open_plain(path) as file:
            size = file.seek(0, 2)
        if path.suffix.lower() not in SHOWN or not 0 < size <= MAX_PICTURE_BYTES:
            raise InputError(f"{path} cannot be shown: {', '.join(SHOWN)} of at most {MAX_PICTURE_BYTES >> 20} MiB can")
        if path.name in found:
            raise InputError(f"{path}: two pictures are named {path.name}")
        found[path.name] = path
    own = [clip.path / name for name in OWN if name not in found and (clip.path / name).is_file()]
    return [*found.values(), *own]


def public(clip: ClipFolder, card: CardConfig) -> dict[str, Any]:
    """A clip's description without folders of this machine: of paths, names are left."""
    found = {**clip.description, "settings": _without_folders(clip.settings)}
    if clip.info.additions:
        found["additions"] = _without_folders(dict(clip.info.additions), all_places=True)
    base = card.base or clip.info.base
    return {**found, "base": base if card.base or not _is_place(base) else PurePath(base).name}


def _without_folders(value: Any, *, all_places: bool = False) -> Any:
    """`all_places`: of texts that are paths all, relative ones too."""
    if isinstance(value, dict):
        return {name: _without_folders(one, all_places=all_places or name == "video") for name, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one, all_places=all_places) for one in value]
    return PurePath(value).name if isinstance(value, str) and (all_places or _is_place(value)) else value


def _is_place(text: str) -> bool:
    """Whether it is a path that begins somewhere on this machine."""
    return PurePath(text).is_absolute() or text.startswith(("~/", "./", "../"))


def written_card(hub_id: str, described: dict[str, Any], pictures: list[str], card: CardConfig) -> str:
    """The text of README.md: what the hub reads in front, then what people do."""
    base = described["base"]
    data = ModelCardData(
        base_model=base if "/" in base else None,
        library_name="tav-opt",
        license=card.license,
        pipeline_tag="text-to-video",
        tags=["tune-a-video", "tav-opt", "video-editing", "stable-diffusion"],
    )
    size = f"{described['frames']} frames of {described['width']}×{described['height']}, {described['fps']:g} a second"
    settings = {name: value for name, value in described["settings"].items() if not isinstance(value, dict)}
    here = _added(described) + (
        ""
        if "/" in base
        else f" --base DIRECTORY   # of the base, whose hash begins with {described['base_hash'][:12]}"
    )
    rows = [("caption", described["prompt"]), ("clip", size), ("base", base)]
    rows += [(f"its {name.replace('_', ' ')}", _text(value)) for name, value in _additions(described)]
    rows += [("its hash", described["base_hash"]), ("inversion", _inversion(described))]
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {hub_id.split('/')[1]}",
        "A clip tuned with [Tune-A-Video](https://arxiv.org/abs/2212.11565) by tav-opt: prompts edit it.",
        *(_shown(name) for name in pictures),
        f'```sh\ntav-opt edit {hub_id} --prompt "…" --out edit.mp4{here}\ntav-opt export {hub_id}{here}\n```',
        _table(rows),
        "## Tuned with",
        _table([(name.replace("_", " "), _text(value)) for name, value in settings.items()]) if settings else "unknown",
        "## Licence",
        _LICENCE,
    ]
    return str(ModelCard("\n\n".join(lines) + "\n", ignore_metadata_errors=False))


def _additions(described: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in described.get("additions", {}).items() if value]


def _added(described: dict[str, Any]) -> str:
    """Options of what was added to the base, which whoever takes the clip has in files of their own."""
    options = {"loras": "lora", "embeddings": "embedding", "vae": "vae", "model_config": "model-config"}
    return "".join(
        f" --{options[name]} {shlex.quote(one)}"
        for name, value in _additions(described)
        for one in ([value] if isinstance(value, str) else value)
    )


def _inversion(described: dict[str, Any]) -> str:
    iterations = described.get("inversion_iterations", 0)
    return f"{described['inversion_steps']} steps" + (f", of {iterations} iterations each" if iterations else "")


def _shown(name: str) -> str:
    address = name.replace(" ", "%20")
    return f'<video controls loop src="{address}"></video>' if name.lower().endswith(".mp4") else f"![]({address})"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_escaped(name)} | {_escaped(value)} |" for name, value in rows)])


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _escaped(text: str) -> str:
    """As it stands in a cell: no markup of whoever wrote the caption."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in r"\|*_`[]" else letter for letter in text)


def _uploaded(folder: Path, hub_id: str, private: bool) -> str:
    api = HfApi()
    try:
        address = api.create_repo(hub_id, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="A tuned clip, by tav-opt push")
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        hint = " (hf auth login, with a token that may write)" if code in (401, 403) else ""
        raise InputError(f"{hub_id} was not pushed: {first_line(error)}{hint}") from None
    except (OSError, ValueError) as error:  # no connection, no token, offline
        raise InputError(f"{hub_id} was not pushed: {first_line(error)}") from None
    return str(address)
