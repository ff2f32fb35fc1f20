"""The four ONNX graphs of a base model: text encoder, VAE encoder, UNet (a clip's values are inputs), VAE decoder."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.export import Dim

from tav_opt.checkpoint import VALUES, load_tensors
from tav_opt.config import Additions, PathLike
from tav_opt.contract import ClipInfo
from tav_opt.engines import pytorch
from tav_opt.engines.pytorch import ClipUNet, TextEncoder, TorchEngine, VaeDecoder, VaeEncoder, input_name
from tav_opt.export import clip_norm, sparse_causal
from tav_opt.export.simplifying import simplify
from tav_opt.export.sparse_causal import OPSET, Body
from tav_opt.models import StableDiffusion
from tav_opt.repository.specs import GraphSpec, TensorSpec
from tav_opt.unet import VideoUNet


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A module to export, what it takes and gives, and the clip's own values that it is traced with."""

    spec: GraphSpec
    module: nn.Module
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """By parameter."""
    below: int = 0
    """Integer inputs lie in 0…below-1."""
    kind: str = ""
    """The base's own graph that it is a variant of, whose tolerances it has; none: it is that itself."""

    @property
    def name(self) -> str:
        return self.spec.name

    def traced(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Arguments to trace the module with, their free axes 2 long; and the values by keyword, where it takes some.

        As the last positional argument a dictionary would be taken for keyword arguments.
        """
        shapes = [(spec.fixed(2), getattr(torch, spec.dtype)) for spec in self.spec.inputs]
        weight = next(self.module.parameters(), None)
        device = None if weight is None else weight.device
        zeros = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes)
        return zeros, self.keywords(self.values)

    def shapes(self, free: Callable[[str], Dim]) -> dict[str, Any]:
        """What torch.export is told of the axes: those that are free, and that a clip's values have none."""
        axes = {name: free(name) for spec in self.spec.inputs for name in spec.free.values()}
        found = [{number: axes[name] for number, name in spec.free.items()} for spec in self.spec.inputs]
        # By the module's own names, under which it may take several.
        return dict(signature(self.module.forward).bind(*found, **self.keywords(dict.fromkeys(self.values))).arguments)

    def keywords(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A clip's values as the module takes them."""
        return {"values": dict(values)} if self.values else {}

    def run(self, inputs: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The module on inputs by name and another clip's values by parameter."""
        given = [inputs[spec.name] for spec in self.spec.inputs]
        return self.spec.by_name(self.module(*given, **self.keywords(values)))


def graphs(sd: StableDiffusion, values: dict[str, Tensor], latent_shape: Sequence[int]) -> list[Graph]:
    """The graphs of a base for clips whose latents are (c, f, h, w), with tensors to trace them."""
    c, _, h, w = latent_shape
    tokens, width = sd.tokenizer.model_max_length, sd.unet.config.cross_attention_dim
    text = _tensor("text", "n", tokens, width)
    latents, pixels = _tensor("latents", "n", c, h, w), _tensor("pixels", "n", 3, h * sd.vae_factor, w * sd.vae_factor)
    ids = _tensor("input_ids", "n", tokens, dtype="int64")
    return [
        Graph(
            spec=GraphSpec(name="text_encoder", inputs=(ids,), outputs=(text,)),
            module=TextEncoder(sd.text_encoder),
            below=sd.text_encoder.config.vocab_size,
        ),
        Graph(spec=GraphSpec(name="vae_encoder", inputs=(pixels,), outputs=(latents,)), module=VaeEncoder(sd.vae)),
        unet_graph(sd.unet, values, latent_shape, tokens, len(sd.schedule.alphas_cumprod)),
        Graph(spec=GraphSpec(name="vae_decoder", inputs=(latents,), outputs=(pixels,)), module=VaeDecoder(sd.vae)),
    ]


def _tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype=dtype)


def of_clip(clip: Path, base: PathLike | Additions | None = None) -> tuple[TorchEngine, list[Graph]]:
    """An exported clip in eager PyTorch, and its base's graphs traced with its values; `base`: where that is now."""
    eager = pytorch.open_checkpoint(clip, base=base)
    values = {name: value.float() for name, value in load_tensors(clip / VALUES).items()}
    return eager, graphs(eager.sd, values, network_shape(eager.info, eager.source_latents))


def network_shape(info: ClipInfo, latents: Tensor) -> tuple[int, ...]:
    """(c, f, h, w) that the network takes of a clip's latents (1, c, f, h, w), which may have more frames."""
    _, channels, _, height, width = latents.shape
    return channels, info.network_frames, height, width


def unet_graph(
    unet: VideoUNet,
    values: dict[str, Tensor],
    latent_shape: Sequence[int],
    tokens: int,
    timesteps: int,
    *,
    name: str = "unet",
    further: Sequence[TensorSpec] = (),
    features: Sequence[TensorSpec] = (),
) -> Graph:
    """The UNet's graph for latents (c, f, h, w), so many tokens and timesteps.

    Of another name it is a variant, which is told `further` tensors by the names of `unet.arguments`, or gives the
    `features` of its outermost layers.
    """
    text = _tensor("text", "b", tokens, unet.config.cross_attention_dim)
    return Graph(
        spec=GraphSpec(
            name=name,
            inputs=(_tensor("latents", "b", *latent_shape), _tensor("timestep", "b", dtype="int64"), text, *further),
            outputs=(_tensor("noise", "b", *latent_shape), *features),
            values={name: _tensor(input_name(name), *value.shape) for name, value in values.items()},
        ),
        module=ClipUNet(unet, [one.name for one in further], gives_features=bool(features)),
        values=values,
        below=timesteps,
        kind="unet",
    )


def unet_variant(
    sd: StableDiffusion,
    values: dict[str, Tensor],
    latent_shape: Sequence[int],
    name: str,
    further: Sequence[TensorSpec] = (),
    features: Sequence[TensorSpec] = (),
) -> Graph:
    """A base's UNet that is told `further` tensors by the names of `unet.arguments`, or gives `features`."""
    tokens, timesteps = sd.tokenizer.model_max_length, len(sd.schedule.alphas_cumprod)
    told: dict[str, Any] = {"name": name, "further": further, "features": features}
    return unet_graph(sd.unet, values, latent_shape, tokens, timesteps, **told)


def unet_of(sd: StableDiffusion, values: dict[str, Tensor], spec: GraphSpec) -> Graph:
    """The UNet's graph that an exported base describes."""
    module = ClipUNet(sd.unet, spec.further, gives_features=spec.gives_features)
    return Graph(spec=spec, module=module, values=values, below=len(sd.schedule.alphas_cumprod), kind="unet")


@torch.no_grad()
def write(graph: Graph, folder: Path, body: Body = "onnxruntime") -> Path:
    """Writes `<name>.onnx`, and its weights beside it in `<name>.onnx.data`, into `folder`."""
    arguments, kwargs = graph.traced()
    # The bounds of a free axis are those of the trace, not of the file: it runs at any length.
    shapes = graph.shapes(lambda name: Dim(name, min=2, max=3))
    with quiet(), uncollected():
        program = torch.onnx.export(
            graph.module.eval(),
            arguments,
            kwargs=kwargs,
            dynamic_shapes=shapes,
            output_names=[spec.name for spec in graph.spec.outputs],
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # below, in a fifth of the time
            verbose=False,
            custom_translation_table={
                torch.ops.tav_opt.sparse_causal_attention.default: sparse_causal.translate,
                torch.ops.tav_opt.clip_group_norm.default: clip_norm.translate,
            },
        )
        assert program is not None
        model = program.model
        simplify(model)
    names = [spec.name for spec in (*graph.spec.inputs, *graph.spec.values.values())]
    assert len(names) == len(set(names)) == len(model.graph.inputs), "an input was dropped, or two have one name"
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    ClearMetadataAndDocStringPass()(model)  # stack traces, with the paths of this machine
    sparse_causal.append_body(model, body, clip_norm.function_body(body))
    path = folder / graph.spec.file
    program.save(path, external_data=True)
    return path


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter warns of every buffer and of packages that are not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the search for garbage, an eighth of the time: a trace makes a million objects, and they stay."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
