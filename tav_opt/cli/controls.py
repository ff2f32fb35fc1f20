"""What commands take of conditions: names, maps, networks, detectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from tav_opt.conditions.network_options import Several, named
from tav_opt.config import Control, Count, Fit, InputError

if TYPE_CHECKING:
    import numpy as np

SOURCE = "source"
"""In place of a file: the clip itself."""


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """Maps that an edit follows."""

    control: Annotated[
        Several,
        arg(
            metavar="NAME=FILE",
            help="Maps to follow, a video or folder of images with as many frames as the clip, fitted to its size; "
            f"or {SOURCE}: what is detected in the clip itself. Once per network.",
        ),
    ] = ()
    control_scale: Annotated[Several, arg(metavar="[NAME=]SCALE", help="How far they are followed; default: 1.")] = ()
    control_steps: Annotated[
        Several, arg(metavar="[NAME=]START:END", help="From and to which share of the steps; default: 0:1.")
    ] = ()
    control_stride: Count | None = None
    """Take every STRIDE-th frame of the maps' videos, from their first; default: all, which must be as many."""
    detect: bool = False
    """The files of --control are videos in which maps of their names are detected."""
    detector: Annotated[
        Several, arg(metavar="NAME=PLACE", help="Where a detector's network is; default: the usual one, of the hub.")
    ] = ()


def controls(options: ControlOptions) -> tuple[Control, ...]:
    """What is asked of each name; raises InputError where an option means nothing."""
    names = list(named("control", options.control, "FILE"))
    scales = _each("control-scale", options.control_scale, names)
    steps = {name: _window(value) for name, value in _each("control-steps", options.control_steps, names).items()}
    named_detectors = named("detector", options.detector, "PLACE")
    if not names and (options.detect or options.control_stride is not None or named_detectors):
        raise InputError("--detect, --detector and --control-stride are for --control, which is not given")
    if idle := sorted(set(named_detectors) - set(_detected(options))):
        raise InputError(
            f"--detector {idle[0]}: nothing is detected of that name (--detect, or --control {idle[0]}={SOURCE})"
        )
    return tuple(
        Control(name=name, scale=_number("control-scale", scales.get(name, "1")), **steps.get(name, {}))
        for name in names
    )


def _each(option: str, given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """By name: of `NAME=VALUE` that name's, of a value alone everyone's who has none."""
    common = [one for one in given if "=" not in one]
    own = named(option, [one for one in given if "=" in one], "VALUE")
    if given and not names:
        raise InputError(f"--{option} is for --control, which is not given")
    if len(common) > 1:
        raise InputError(f"--{option} {common[1]!r}: a second value for all")
    if unknown := sorted(set(own) - set(names)):
        raise InputError(f"--{option} {unknown[0]}: no --control has that name; there are {', '.join(names)}")
    return dict.fromkeys(names, common[0]) | own if common else own


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--{option} {text!r} is no number") from None


def _window(text: str) -> dict[str, float]:
    start, colon, end = text.partition(":")
    if not colon:
        raise InputError(f"--control-steps {text!r} is not START:END, as 0:0.5")
    return {"start": _number("control-steps", start), "end": _number("control-steps", end)}


def _detected(options: ControlOptions) -> list[str]:
    given = named("control", options.control, "FILE")
    return [name for name, value in given.items() if options.detect or value == SOURCE]


def asked(options: ControlOptions) -> tuple[Control, ...]:
    """As `controls`, once all that can be wrong with their maps is found."""
    found = controls(options)
    check(options)
    return found


def check(options: ControlOptions) -> None:
    """What can be wrong with maps, found before the work."""
    from tav_opt.conditions.detectors import detecting

    for name in _detected(options):
        detecting.check_kind(name)
    for value in named("control", options.control, "FILE").values():
        if value != SOURCE and not Path(value).exists():
            raise InputError(f"{value} does not exist")


def maps(
    options: ControlOptions,
    frames: int,
    height: int,
    width: int,
    source: Callable[[], np.ndarray],
    fit: Fit,
) -> dict[str, np.ndarray]:
    """uint8 (f, H, W, 3) by name; `source` gives the clip's own frames, fitted by `fit`. Raises InputError."""
    places: Mapping[str, str] = named("detector", options.detector, "PLACE")
    detected, found = _detected(options), {}
    for name, value in named("control", options.control, "FILE").items():
        if value == SOURCE:
            read = source()
        else:
            from tav_opt.conditions.maps import read_maps

            read = read_maps(Path(value), frames, height, width, options.control_stride, fit)
        if name in detected:
            from tav_opt.conditions.detectors import detecting

            read = detecting.detect(name, read, places.get(name))
        found[name] = read
    return found
