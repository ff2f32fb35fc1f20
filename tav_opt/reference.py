"""YAML files of settings: those of the reference implementation as they are, and our own."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import yaml

from tav_opt.config import EDIT_DEFAULTS, ClipConfig, EditConfig, InputError, PathLike, TrainConfig

C = TypeVar("C", bound=Any)


class RunConfig(NamedTuple):
    """What a YAML file says of a run."""

    model: str
    clip: ClipConfig
    train: TrainConfig
    prompt: str
    edit: EditConfig
    out: Path
    edit_defaults: dict[str, Any]
    """Of the settings of edits, those that the file gives, by name: they become the clip's own."""


_CLIP = {
    "video_path": "video",
    "n_sample_frames": "frames",
    "width": "width",
    "height": "height",
    "sample_start_idx": "start",
    "sample_frame_rate": "stride",
}
_TRAIN = {
    "max_train_steps": "steps",
    "learning_rate": "lr",
    "lr_scheduler": "schedule",
    "lr_warmup_steps": "warmup",
    "adam_weight_decay": "weight_decay",
    "adam_epsilon": "eps",
    "max_grad_norm": "clip_norm",
    "gradient_accumulation_steps": "accumulation",
    "trainable_modules": "trainable",
    "gradient_checkpointing": "gradient_checkpointing",
    "mixed_precision": "autocast",
    "seed": "seed",
    "validation_steps": "preview_every",
}
_EDIT = {
    "prompts": "prompts",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance_scale",
    "use_inv_latent": "inversion",
    "num_inv_steps": "inversion_steps",
}
# Of the reference's settings, what has one possible value here.
_FIXED = {"train_batch_size": 1, "scale_lr": False, "use_8bit_adam": False, "resume_from_checkpoint": None}
# What needs no saying here: attention is memory-efficient anyway, and a stopped run resumes by itself.
_IGNORED = {"enable_xformers_memory_efficient_attention", "checkpointing_steps"}
_OTHER = {"pretrained_model_path", "output_dir", "train_data", "validation_data", "adam_beta1", "adam_beta2"}


def read_reference_config(path: PathLike) -> RunConfig:
    """Reads one of the reference's YAML files, or our own.

    Ours holds model, prompt, out, prompts (of edits), and any field of ClipConfig and TrainConfig. Raises InputError,
    naming the key, for keys that are unknown or missing and for values of the wrong kind.
    """
    path = Path(path)
    found = read_yaml(path)
    try:
        return _reference(found) if "pretrained_model_path" in found else _own(found)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class _OnceEach(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML's own loader takes the last in silence."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value[:60]!r} stands twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: PathLike) -> dict[str, Any]:
    """The keys and values of a YAML file; raises InputError for what cannot be read or holds none."""
    try:
        found = yaml.load(Path(path).read_text(), _OnceEach)  # nosec B506  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no settings (key: value)")
    return found


def _own(found: dict[str, Any]) -> RunConfig:
    clip, train = ({f.name for f in fields(kind)} & found.keys() for kind in (ClipConfig, TrainConfig))
    check_keys(found, {*clip, *train, "model", "out", "prompt", "prompts"}, ("model", "prompt", "video"))
    settings = made(TrainConfig, {name: found[name] for name in train})
    return RunConfig(
        model=as_declared(str, "model", found["model"]),
        clip=made(ClipConfig, {name: found[name] for name in clip}),
        train=settings,
        prompt=as_declared(str, "prompt", found["prompt"]),
        edit=EditConfig(
            prompts=as_declared(tuple[str, ...], "prompts", found.get("prompts", [])),
            seed=settings.seed,
        ),
        out=as_declared(Path, "out", found.get("out", "ckpt")),
        edit_defaults={},
    )


def _reference(found: dict[str, Any]) -> RunConfig:
    check_keys(found, {*_TRAIN, *_FIXED, *_IGNORED, *_OTHER}, ("pretrained_model_path", "output_dir", "train_data"))
    for name, value in _FIXED.items():
        if found.get(name, value) != value:
            raise InputError(f"{name}: {found[name]!r} is not supported, only {value!r} is")
    data, validation = (as_declared(dict, name, found.get(name) or {}) for name in ("train_data", "validation_data"))
    check_keys(data, {*_CLIP, "prompt"}, ("video_path", "prompt"), "train_data.")
    check_keys(validation, {*_EDIT, "video_length", "width", "height"}, (), "validation_data.")
    clip = replace(made(ClipConfig, _renamed(data, _CLIP)), fit="squash")
    for name, size in (("video_length", clip.frames), ("width", clip.width), ("height", clip.height)):
        if validation.get(name, size) != size:
            raise InputError(f"validation_data.{name}: {validation[name]!r} is not the clip's {size}")
    edit = made(EditConfig, _renamed(validation, _EDIT))
    train = made(TrainConfig, _renamed(found, _TRAIN))
    betas = tuple(
        as_declared(float, f"adam_beta{i}", found.get(f"adam_beta{i}", beta)) for i, beta in enumerate(train.betas, 1)
    )
    return RunConfig(
        model=as_declared(str, "pretrained_model_path", found["pretrained_model_path"]),
        clip=clip,
        train=replace(
            train,
            betas=(betas[0], betas[1]),
            preview_prompts=edit.prompts,
            preview_every=train.preview_every if edit.prompts else 0,
            inversion_steps=edit.inversion_steps or train.inversion_steps,
        ),
        prompt=as_declared(str, "train_data.prompt", data["prompt"]),
        edit=replace(edit, seed=train.seed, inversion_steps=None),  # the clip is inverted once, by tuning
        out=as_declared(Path, "output_dir", found["output_dir"]),
        edit_defaults={
            ours: getattr(edit, ours)
            for theirs, ours in _EDIT.items()
            if theirs in validation and ours in EDIT_DEFAULTS
        },
    )


def check_keys(found: dict[str, Any], known: set[str], needed: tuple[str, ...], where: str = "") -> None:
    """Raises InputError, naming the key and `where` it stands, for one that is unknown and one that is missing."""
    if unknown := [key for key in found if key not in known]:
        raise InputError(f"unknown key {where}{unknown[0]}: there are {', '.join(sorted(known))}")
    if missing := [key for key in needed if key not in found]:
        raise InputError(f"key {where}{missing[0]} is missing")


def _renamed(found: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: found[theirs] for theirs, ours in names.items() if theirs in found}


def made(kind: type[C], values: dict[str, Any]) -> C:
    """A configuration of values as YAML has them; raises InputError for one of another kind than its field's."""
    hints = get_type_hints(kind)
    return kind(**{name: as_declared(hints[name], name, value) for name, value in values.items()})


def as_declared(hint: Any, name: str, value: Any) -> Any:
    """The value as the type that a field declares; YAML reads 3e-5 as a string, and lists for tuples."""
    origin, args = get_origin(hint), get_args(hint)
    if len(args) == 2 and args[1] is type(None):
        return None if value is None else as_declared(args[0], name, value)
    wrong = InputError(f"{name}: {value!r} is not {getattr(hint, '__name__', str(hint))}")
    if origin is Literal:
        if value not in args:
            raise InputError(f"{name}: {value!r} is not {', '.join(map(repr, args))}")
        return value
    if hint == tuple[str, ...] and isinstance(value, str):
        return (value,)
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not ... and len(value) != len(args)):
            raise wrong
        return tuple(as_declared(args[0], name, item) for item in value)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            raise wrong from None
    kind = str if hint is Path else hint
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in (kind, *args)):
        raise wrong
    return hint(value) if hint is Path else value
