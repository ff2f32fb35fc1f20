"""The four ONNX graphs of a base model: text encoder, VAE encoder, UNet (a clip's values are inputs), VAE decoder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.export import Dim

from tav_opt.export.sparse_causal import OPSET, Body, append_body, translate
from tav_opt.models import StableDiffusion
from tav_opt.unet import VideoUNet


class TextEncoder(nn.Module):
    """input_ids (n, tokens) → last hidden state (n, tokens, width)."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_encoder(input_ids)[0]


class VaeEncoder(nn.Module):
    """pixels (n, 3, H, W) in −1…1 → the posterior's mean, scaled (n, c, h, w)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor


class VaeDecoder(nn.Module):
    """Scaled latents (n, c, h, w) → pixels (n, 3, H, W), about −1…1."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample


class ClipUNet(nn.Module):
    """The video UNet as a function of a clip's own values: everything else in it is constant."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, values: dict[str, Tensor]) -> Tensor:
        """latents (b,c,f,h,w), timestep (b,), text (b,tokens,width), values by parameter name → noise or v."""
        return torch.func.functional_call(self.unet, values, (latents, timestep, text))


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A module to export and the tensors it is traced with: the first axis of `inputs` is free, `values` are fixed."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    output: str
    axis: str
    values: dict[str, Tensor] | None = None
    below: int = 0
    """Integer inputs lie in 0…below-1."""


def input_name(parameter: str) -> str:
    """The graph input of a clip's value: dots become underscores."""
    return parameter.replace(".", "_")


def graphs(sd: StableDiffusion, values: dict[str, Tensor], latent_shape: Sequence[int]) -> list[Graph]:
    """The graphs of a base for clips whose latents are (c, f, h, w), with tensors to trace them."""
    c, _, h, w = latent_shape
    tokens = sd.tokenizer.model_max_length
    pixels = torch.zeros(2, 3, h * sd.vae_factor, w * sd.vae_factor)
    return [
        Graph(
            name="text_encoder",
            module=TextEncoder(sd.text_encoder),
            inputs={"input_ids": torch.zeros(2, tokens, dtype=torch.int64)},
            output="text",
            axis="n",
            below=sd.text_encoder.config.vocab_size,
        ),
        Graph(name="vae_encoder", module=VaeEncoder(sd.vae), inputs={"pixels": pixels}, output="latents", axis="n"),
        unet_graph(sd.unet, values, latent_shape, tokens, len(sd.schedule.alphas_cumprod)),
        Graph(
            name="vae_decoder",
            module=VaeDecoder(sd.vae),
            inputs={"latents": torch.zeros(2, c, h, w)},
            output="pixels",
            axis="n",
        ),
    ]


def unet_graph(
    unet: VideoUNet, values: dict[str, Tensor], latent_shape: Sequence[int], tokens: int, timesteps: int
) -> Graph:
    """The UNet's graph for latents (c, f, h, w), so many tokens and timesteps."""
    return Graph(
        name="unet",
        module=ClipUNet(unet),
        inputs={
            "latents": torch.zeros(2, *latent_shape),
            "timestep": torch.zeros(2, dtype=torch.int64),
            "text": torch.zeros(2, tokens, unet.config.cross_attention_dim),
        },
        output="noise",
        axis="b",
        values=values,
        below=timesteps,
    )


@torch.no_grad()
def write(graph: Graph, folder: Path, body: Body = "onnxruntime") -> Path:
    """Writes `<name>.onnx`, and its weights beside it in `<name>.onnx.data`, into `folder`."""
    # The bounds of the free axis are those of the trace, not of the file: it runs at any length.
    free = Dim(graph.axis, min=2, max=3)
    shapes: dict[str, Any] = {name: {0: free} for name in graph.inputs}
    kwargs: dict[str, Any] = {}
    if graph.values is not None:
        shapes["values"] = dict.fromkeys(graph.values)
        # By keyword: a dictionary as the last positional argument would be taken for keyword arguments.
        kwargs["values"] = graph.values
    with _quiet():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            kwargs=kwargs,
            dynamic_shapes=shapes,
            output_names=[graph.output],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            custom_translation_table={torch.ops.tav_opt.sparse_causal_attention.default: translate},
        )
    assert program is not None
    model = program.model
    names = [*graph.inputs, *map(input_name, graph.values or {})]
    assert len(names) == len(set(names)) == len(model.graph.inputs), "an input was dropped, or two have one name"
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    ClearMetadataAndDocStringPass()(model)  # stack traces, with the paths of this machine
    append_body(model, body)
    path = folder / f"{graph.name}.onnx"
    program.save(path, external_data=True)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of every buffer and of packages that are not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
