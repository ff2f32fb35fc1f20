"""What several commands take, mention and write."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import UseAppendAction, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from tav_opt.config import FILLED_IN, EditConfig, check_numbers, check_text, literal_weights

if TYPE_CHECKING:
    import numpy as np

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
E = TypeVar("E", bound=EditConfig)
Prompts = Annotated[UseAppendAction[tuple[str, ...]], arg(name="prompt", help="What to draw; give it once per edit.")]
Guidance = Annotated[float, arg(name="guidance", help="Classifier-free guidance scale.")]
_SWITCH = {"on": True, "off": False, "auto": None}
TYPES = ConstructorRegistry()
"""What commands read in a way of their own: switches."""


@TYPES.primitive_rule
def _switch(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool | None] | None:
    """What may be left to the program: alone a flag, as of any bool, and `on`, `off` or `auto`."""
    if info.type != bool | None:
        return None
    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[on|off|auto]",
        instance_from_str=lambda given: _SWITCH[given[0]] if given else True,
        is_instance=lambda value: value in _SWITCH.values(),
        str_from_instance=lambda value: [name for name, meant in _SWITCH.items() if meant is value],
        choices=tuple(_SWITCH),
    )


def given_settings(kind: type[E], prog: str, arguments: Sequence[str]) -> tuple[E, set[str]]:
    """What a command line says, and which of FILLED_IN and the seed it gives: those that no default changes."""
    args = tyro.cli(kind, prog=prog, args=arguments, registry=TYPES)
    numbers = ("steps", "guidance_scale", "guidance_interval", "reuse_interval", "seed")
    others = {name: getattr(EditConfig, name) + 1 for name in numbers}
    changed = replace(args, **others, inversion=False, solver="unipc")
    again = tyro.cli(kind, prog=prog, args=arguments, default=changed, registry=TYPES)
    return args, {name for name in (*FILLED_IN, "seed") if getattr(again, name) == getattr(args, name)}


def check_edit(args: EditConfig, out: Path, files: int) -> None:
    """What can be wrong with an edit and its files, found before the work."""
    from tav_opt import video

    check_numbers(args)
    for text in (*args.prompts, args.negative_prompt):
        check_text("prompt", text)
    for path in _numbered(out, files):
        video.check_out(path)


def write(
    out: Path,
    edits: Sequence[np.ndarray | bytes],
    fps: float,
    metadata: Sequence[Mapping[str, Any]],
    sound: bytes | None = None,
) -> None:
    """Each edit, of frames or a file, under a name of its own; a server's files carry their metadata already."""
    from tav_opt import video

    for number, (path, edit) in enumerate(zip(_numbered(out, len(edits)), edits, strict=True)):
        if isinstance(edit, bytes):
            video.write_encoded(path, edit)
        else:
            video.write(path, edit, fps, metadata[number] if metadata else None, sound=sound)
        print(path)


def _numbered(out: Path, count: int) -> list[Path]:
    """A name for each of so many edits."""
    if count < 2 or not out.name:
        return [out]
    return [out.with_stem(f"{out.stem}-{number}") for number in range(1, count + 1)]


def mention_weights(name: str, texts: Sequence[str]) -> None:
    """Says so where prompts have another program's syntax."""
    if said := literal_weights(texts):
        print(f"tav-opt {name}: {said}", file=sys.stderr)


def mention_idle_seed(name: str, seed: int, *, inversion: bool, eta: float) -> None:
    """Says so where a seed was asked for and decides nothing."""
    if inversion and eta == 0:
        print(
            f"tav-opt {name}: --seed {seed} has no effect: an edit from inverted latents with eta 0 draws no "
            "noise (--eta above 0 or --no-inversion does)",
            file=sys.stderr,
        )


def listed(settings: Mapping[str, Any]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
