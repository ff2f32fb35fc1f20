"""The UNet's graphs for feature reuse: the whole network, which gives the features of its outermost layers, and those
layers alone, which take them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tav_opt import outermost
from tav_opt.export import graphs
from tav_opt.export.additions import Further
from tav_opt.export.graphs import Graph
from tav_opt.models import StableDiffusion
from tav_opt.repository.specs import TensorSpec
from tav_opt.reuse import FEATURES


def _features(sd: StableDiffusion, latents: Sequence[int]) -> list[TensorSpec]:
    _, f, h, w = latents
    return [TensorSpec(name=FEATURES, shape=("b", f, outermost.channels(sd.unet), h, w), dtype="float32")]


def _whole(sd: StableDiffusion, values: dict[str, Tensor], latents: Sequence[int]) -> Graph:
    return graphs.unet_variant(sd, values, latents, "unet_whole", features=_features(sd, latents))


def _outermost(sd: StableDiffusion, values: dict[str, Tensor], latents: Sequence[int]) -> Graph:
    return graphs.unet_variant(sd, values, latents, "unet_outermost", _features(sd, latents))


REUSABLE = tuple(
    Further(name=f"unet_{name}", make=make, made_of={"outermost": outermost.LAYERS})
    for name, make in {"whole": _whole, "outermost": _outermost}.items()
)
