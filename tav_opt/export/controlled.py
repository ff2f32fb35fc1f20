"""The UNet's graph with attention control: told what each row takes of the source's, it tells where words look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from tav_opt.export.additions import Further
from tav_opt.export.graphs import Graph, unet_variant
from tav_opt.models import StableDiffusion
from tav_opt.repository.specs import TensorSpec


def controlled(sd: StableDiffusion, values: dict[str, Tensor], latents: Sequence[int]) -> Graph:
    """For latents (c, f, h, w): beside the plain graph's inputs those of `attention_control`, and a channel more."""
    tokens = sd.tokenizer.model_max_length
    axes: dict[str, tuple[int | str, ...]] = {
        "token_map": ("b", tokens, tokens),
        "word_weights": ("b", tokens),
        "blend_words": ("b", tokens),
    }
    further = [TensorSpec(name=name, shape=("b",), dtype="int64") for name in ("self_source", "cross_source")]
    further += [TensorSpec(name=name, shape=shape, dtype="float32") for name, shape in axes.items()]
    graph = unet_variant(sd, values, latents, CONTROLLED.name, further)
    channels, *rest = latents
    noise = TensorSpec(name="noise", shape=("b", channels + 1, *rest), dtype="float32")
    return replace(graph, spec=replace(graph.spec, outputs=(noise,)))


CONTROLLED = Further(name="unet_controlled", make=controlled)
