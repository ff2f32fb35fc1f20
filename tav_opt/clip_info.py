"""What is known of a tuned clip, and what an edit of it says of itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any, TypeVar

from tav_opt import __version__
from tav_opt.config import (
    EDIT_DEFAULTS,
    PRESETS,
    ClipConfig,
    EditConfig,
    EngineName,
    Fit,
    InputError,
    InversionConfig,
    Preset,
    check_numbers,
)
from tav_opt.served_tensors import OF_CONTROLS, WORDS

E = TypeVar("E", bound=EditConfig)

VERSION = 1
"""Of the exported files and the served tensors; another version is refused."""


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """What is known of a tuned clip beside its tensors: kept in a checkpoint and in an exported clip."""

    base: str
    """Path or hub id of the image model."""
    base_hash: str
    """Of all that it holds, and of what was added to it."""
    prompt: str
    frames: int
    height: int
    width: int
    fps: float
    inversion_steps: int
    edit: Mapping[str, Any] = field(default_factory=dict)
    """Of EDIT_DEFAULTS, those that the clip was tuned to be edited with."""
    inversion_iterations: int = InversionConfig.iterations
    additions: Mapping[str, Any] = field(default_factory=dict)
    """What was added to the image model, as config.Additions has it."""
    window: int | None = None
    """Frames that the network takes at once, where those are fewer than the clip has."""
    source_height: int | None = None
    """At which the source is shown, of which the frames were fitted; None where nobody kept that."""
    source_width: int | None = None
    fit: Fit = ClipConfig.fit
    """How they were: cropped or squashed."""
    version: int = VERSION

    @property
    def network_frames(self) -> int:
        """Frames that the network takes at once; a source has at least so many."""
        return self.window or self.frames

    @property
    def exported_base(self) -> str:
        """The folder of the graphs that serve this clip, and every other one of its base, window and size."""
        return f"{self.base_hash[:16]}-{self.network_frames}x{self.height}x{self.width}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def inversion(self) -> InversionConfig:
        """Of the latents that are kept with it."""
        return InversionConfig(steps=self.inversion_steps, iterations=self.inversion_iterations)

    def inversion_of(self, edit: EditConfig) -> InversionConfig:
        """Of an edit's start: the clip's own where the edit asks for no other."""
        asked: dict[str, Any] = {"steps": edit.inversion_steps, "iterations": edit.inversion_iterations}
        if edit.filled().direct_inversion:  # step by step beside the edit
            asked |= {"steps": edit.steps, "trajectory": True}
        return replace(self.inversion, **{name: value for name, value in asked.items() if value is not None})

    @classmethod
    def from_json(cls, value: Any) -> ClipInfo:
        """Raises InputError for another version or missing entries."""
        if not isinstance(value, dict):
            raise InputError(f"clip: its description is {type(value).__name__}, not a JSON object")
        if value.get("version") != VERSION:
            raise InputError(f"clip: version {value.get('version')!r} is not {VERSION}; export or tune it again")
        # Clips of before have none of these.
        value = {"edit": {}, "additions": {}, "inversion_iterations": 0, "window": None} | value
        value = {"source_height": None, "source_width": None, "fit": ClipConfig.fit} | value
        if missing := [f.name for f in fields(cls) if f.name not in value]:
            raise InputError(f"clip: its description lacks {', '.join(missing)}")
        from tav_opt import schemas  # not for clients, who read no such file

        schemas.check(schemas.ClipDescription, value, "clip")
        _check_edit_defaults(value["edit"])
        if value["window"] is not None and value["window"] >= value["frames"]:
            raise InputError(f"clip: its window {value['window']} is not below its {value['frames']} frames")
        return cls(**{f.name: value[f.name] for f in fields(cls)})

    def edited(self, config: E, given: Collection[str] = (), preset: Preset = "exact") -> E:
        """The settings of an edit, in which the preset's, or else the clip's, stand for those that were not given."""
        found = {**self.edit, **PRESETS[preset]}
        return replace(config, **{name: value for name, value in found.items() if name not in given})


def _check_edit_defaults(found: Any) -> None:
    kinds: dict[str, Any] = {"steps": int, "guidance_scale": (int, float), "inversion": bool}
    if not isinstance(found, dict) or not all(
        isinstance(value, kinds.get(name, ())) and isinstance(value, bool) == (name == "inversion")
        for name, value in found.items()
    ):
        raise InputError(f"clip: its edit settings {found!r} are not of {', '.join(EDIT_DEFAULTS)}")
    check_numbers(EditConfig(**found))


def edit_metadata(
    info: ClipInfo,
    clip: str,
    config: EditConfig,
    prompts: Sequence[str],
    *,
    engine: EngineName,
    masked: bool = False,
    with_prompts: bool = False,
) -> dict[str, Any]:
    """What a written edit of the clip so named says of itself: where it is from and how to make it again.

    A model in a folder is named without the folders above it, which are nobody's business; its hash tells which it is.
    """
    found = {
        "software": f"tav-opt {__version__}",
        "model": PurePath(info.base).name if PurePath(info.base).is_absolute() else info.base,
        "model_hash": info.base_hash,
        "clip": clip,
        "engine": engine,
        "steps": config.steps,
        "guidance_scale": round(config.guidance_scale, 6),  # float32 on the wire
        "guidance_interval": config.guidance_interval,
        "reuse_interval": config.reuse_interval,
        "solver": config.solver,
        "eta": round(config.eta, 6),
        "seed": config.seed,
        "inversion": config.inversion,
        "inversion_steps": info.inversion_of(config).steps,
        "inversion_iterations": info.inversion_of(config).iterations,
        "masked": masked,
    }
    texts: dict[str, Any] = {"prompts": list(prompts), "negative_prompt": config.negative_prompt}
    if config.controlled:
        filled = config.filled()
        found |= {name: getattr(filled, name) for name in ("keep", "direct_inversion")}
        found |= {name: round(getattr(filled, name), 6) for name in ("replace_cross", "replace_self")}
        texts["source_prompt"] = info.prompt if config.source_prompt is None else config.source_prompt
        texts |= {name: list(getattr(config, name)) for name in WORDS}
    if config.controls:
        numbers = [{name: round(getattr(one, name), 6) for name in OF_CONTROLS} for one in config.controls]
        found["controls"] = [{"name": one.name} | told for one, told in zip(config.controls, numbers, strict=True)]
        found["control_inversion"] = config.control_inversion
    return found | (texts if with_prompts else {})
