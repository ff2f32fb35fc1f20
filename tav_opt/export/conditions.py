"""Graphs of networks that follow maps, and of the UNet that takes what they add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tav_opt.conditions import controlnet, network_files, t2i_adapter
from tav_opt.conditions.condition import DOWN, HINT, INSIDE, MID
from tav_opt.conditions.controlnet import ControlNetFrames, Hint
from tav_opt.conditions.t2i_adapter import AdapterFrames
from tav_opt.config import InputError, PathLike
from tav_opt.contract import check_clip_name
from tav_opt.engines.exported import NETWORKS
from tav_opt.export import graphs
from tav_opt.export.additions import Further
from tav_opt.export.graphs import Graph
from tav_opt.models import StableDiffusion
from tav_opt.repository import specs
from tav_opt.repository.specs import GraphSpec, TensorSpec


def further(controlnets: Mapping[str, PathLike], adapters: Mapping[str, PathLike], base: Path) -> list[Further]:
    """A graph of each network, and of the UNet for each set of kinds that an edit may tell it of.

    `base`: the exported base, which may have networks already, or be not there yet. Raises InputError.
    """
    if twice := sorted(set(controlnets) & set(adapters)):
        raise InputError(f"{twice[0]!r} names a ControlNet and an adapter: each needs a name of its own")
    given = {"controlnet": controlnets, "adapter": adapters}
    networks = ((kind, name, place) for kind, places in given.items() for name, place in places.items())
    found = [graph for one in networks for graph in _graphs_of(*one)]
    if not found:
        return []
    there = specs.added(base) if base.exists() else {}
    kinds = [kind for kind in NETWORKS if given[kind] or any(name.startswith(f"{kind}_") for name in there)]
    _check_names(given, there)
    sets = [chosen for count in range(1, len(kinds) + 1) for chosen in combinations(kinds, count)]
    return [*found, *(Further(name="_".join(("unet", *one)), make=partial(_unet, one)) for one in sets)]


def _check_names(given: Mapping[str, Mapping[str, PathLike]], there: Mapping[str, Any]) -> None:
    for kind, places in given.items():
        for other in NETWORKS:
            if other != kind and (taken := sorted(name for name in places if f"{other}_{name}" in there)):
                raise InputError(f"the base has {taken[0]!r} of another kind: give another name")


def _graphs_of(kind: str, name: str, place: PathLike) -> list[Further]:
    """Of a network: a ControlNet has one for what it sees of maps, once an edit, and one for a step."""
    own, path = check_clip_name(name), network_files.found(place)
    made_of, makes = {"weights": network_files.content(path)}, {"adapter": _adapter}
    if kind == "controlnet":
        made_of |= {"takes": HINT}  # a graph of its name once took the maps themselves
        makes = {kind: _controlnet, HINT: _hint}
    return [
        Further(name=f"{one}_{own}", make=partial(make, path, f"{one}_{own}"), made_of=made_of)
        for one, make in makes.items()
    ]


def _tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype=dtype)


def _controlnet(
    path: Path, name: str, sd: StableDiffusion, _values: dict[str, Tensor], latents: Sequence[int]
) -> Graph:
    frames, (c, _, h, w) = controlnet.load(path, sd.unet.config, sd.vae_factor), latents
    inputs = (
        _tensor("latents", "n", c, h, w),
        _tensor("timestep", "n", dtype="int64"),
        _tensor("text", "n", sd.tokenizer.model_max_length, sd.unet.config.cross_attention_dim),
        _tensor(HINT, "n", sd.unet.config.block_out_channels[0], h, w),
    )
    return _graph(name, frames, inputs, "unet", below=len(sd.schedule.alphas_cumprod))


def _hint(path: Path, name: str, sd: StableDiffusion, _values: dict[str, Tensor], latents: Sequence[int]) -> Graph:
    seeing = controlnet.load(path, sd.unet.config, sd.vae_factor).hint
    return _graph(name, seeing, (_maps(sd, latents),), "vae_encoder")


def _adapter(path: Path, name: str, sd: StableDiffusion, _values: dict[str, Tensor], latents: Sequence[int]) -> Graph:
    frames = t2i_adapter.load(path, sd.unet.config, sd.vae_factor)
    return _graph(name, frames, (_maps(sd, latents),), "unet")


def _maps(sd: StableDiffusion, latents: Sequence[int]) -> TensorSpec:
    _, _, h, w = latents
    return _tensor("maps", "n", 3, h * sd.vae_factor, w * sd.vae_factor)


@torch.no_grad()
def _graph(
    name: str,
    frames: ControlNetFrames | Hint | AdapterFrames,
    inputs: tuple[TensorSpec, ...],
    like: str,
    *,
    below: int = 0,
) -> Graph:
    """`like`: the base's own graph whose tolerances it has."""
    made = frames(*(torch.zeros(one.fixed(1), dtype=getattr(torch, one.dtype)) for one in inputs))
    outputs = tuple(_tensor(output, "n", *x.shape[1:]) for output, x in zip(frames.names, made, strict=True))
    return Graph(spec=GraphSpec(name=name, inputs=inputs, outputs=outputs), module=frames, below=below, kind=like)


def _unet(kinds: Sequence[str], sd: StableDiffusion, values: dict[str, Tensor], latents: Sequence[int]) -> Graph:
    """The UNet that is told what networks of these kinds add."""
    made = {"controlnet": _encoder, "adapter": _blocks}
    told = [_tensor(name, "b", *shape) for kind in kinds for name, shape in made[kind](sd.unet.config, latents)]
    return graphs.unet_variant(sd, values, latents, "_".join(("unet", *kinds)), told)


def _blocks(config: Any, latents: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What is added at the end of each block of the encoder; behind its strided convolution, if it has no attention."""
    _, f, h, w = latents
    for number, (width, kind) in enumerate(zip(config.block_out_channels, config.down_block_types, strict=True)):
        level = number if "CrossAttn" in kind else min(number + 1, len(config.block_out_channels) - 1)
        yield f"{INSIDE}.{number}", (f, width, _halved(h, level), _halved(w, level))


def _encoder(config: Any, latents: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What is added to each of the skips, and to the middle."""
    _, f, h, w = latents
    widths = config.block_out_channels
    levels = [(widths[0], 0)]
    for number, width in enumerate(widths):
        levels += [(width, number)] * config.layers_per_block
        if number + 1 < len(widths):
            levels.append((width, number + 1))
    for number, (width, level) in enumerate(levels):
        yield f"{DOWN}.{number}", (f, width, _halved(h, level), _halved(w, level))
    yield MID, (f, widths[-1], _halved(h, len(widths) - 1), _halved(w, len(widths) - 1))


def _halved(side: int, times: int) -> int:
    """As strided convolutions do it, which round up."""
    return -(-side // 2**times)
