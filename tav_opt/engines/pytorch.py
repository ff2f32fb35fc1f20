"""Eager PyTorch: the reference for every other engine."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from tav_opt import checkpoint, models
from tav_opt.base.directory import Base, recorded_base
from tav_opt.clip_folder import ClipFolder
from tav_opt.conditions import controlnet, framewise, network_files, t2i_adapter
from tav_opt.conditions.condition import Network
from tav_opt.config import Additions, ClipConfig, EngineName, InputError, PathLike
from tav_opt.contract import ClipInfo
from tav_opt.ddim import Schedule, Text, Timestep
from tav_opt.device import usable_device
from tav_opt.engines.exported import Call
from tav_opt.memory import eager
from tav_opt.repository import specs
from tav_opt.repository.specs import GraphSpec
from tav_opt.unet import arguments


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
    """The video UNet as a function of a clip's own values: everything else in it is constant.

    `further` names what it is told beside the text, as `unet.arguments` has it; where it `gives_features`, it answers
    with those that came to the outermost layers too.
    """

    def __init__(self, unet: nn.Module, further: Sequence[str] = (), *, gives_features: bool = False) -> None:
        super().__init__()
        self.unet, self.further = unet, tuple(further)
        self._switches = {"gives_features": True} if gives_features else {}

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, *further: Tensor, values: dict[str, Tensor]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """latents (b,c,f,h,w), timestep (b,), text (b,tokens,width), values by parameter name → noise or v."""
        told = arguments(dict(zip(self.further, further, strict=True))) | self._switches
        return torch.func.functional_call(self.unet, values, (latents, timestep, text), told)


def input_name(parameter: str) -> str:
    """The graph input of a clip's value: dots become underscores."""
    return parameter.replace(".", "_")


@dataclass(frozen=True, kw_only=True)
class TorchEngine:
    """A tuned clip on its base model; see `engines.Engine`."""

    sd: models.StableDiffusion
    info: ClipInfo
    source_latents: Tensor
    inverted_latents: Tensor
    sound: bytes | None = None
    source: ClipConfig | None = None
    networks: Mapping[str, Network] = field(default_factory=dict)

    @property
    def kind(self) -> EngineName:
        return "pytorch"

    @property
    def schedule(self) -> Schedule:
        return self.sd.schedule

    def encode_text(self, prompts: str | Sequence[str]) -> Tensor:
        return models.encode_prompt(self.sd, prompts)

    def encode_video(self, frames: np.ndarray) -> Tensor:
        return models.encode_video(self.sd, frames)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.sd.tokenizer.backend_tokenizer

    def check_told(self, told: Collection[str]) -> None:
        if "self_source" in told:  # the model itself can be told all that there is; a third row takes its memory
            eager.check_editing(self.sd, self.info.network_frames, self.info.height, self.info.width, rows=3)

    def predict(self, latents: Tensor, timestep: Timestep, text: Text) -> Tensor:
        return self.sd.predict(latents, timestep, text)

    def predict_with_features(self, latents: Tensor, timestep: Timestep, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.sd.predict_with_features(latents, timestep, text)

    def decode(self, latents: Tensor) -> np.ndarray:
        return models.decode_video(self.sd, latents)


def base_of(info: ClipInfo, moved: PathLike | Additions | None = None) -> Base:
    """A clip's base model where it was, or has moved; raises InputError when its content is not what was tuned on."""
    return recorded_base(info.base, info.additions, moved, info.base_hash)


def open_checkpoint(
    folder: PathLike | ClipFolder,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    base: PathLike | Additions | None = None,
    controlnets: Mapping[str, PathLike] = MappingProxyType({}),
    adapters: Mapping[str, PathLike] = MappingProxyType({}),
) -> TorchEngine:
    """Loads a checkpoint and its base (`base` where it has moved), and networks that follow maps by their names.

    Raises InputError when either is missing, altered, or they do not belong together.
    """
    place = usable_device(device)
    clip = ClipFolder.at(folder)
    tuned = checkpoint.load(clip)
    sd = models.load(base_of(tuned.info, base), dtype=dtype, device=place)
    networks = load_networks(sd, controlnets, adapters)
    return engine_on(sd, tuned, place, source=_source(clip), networks=networks)


def engine_on(
    sd: models.StableDiffusion,
    tuned: checkpoint.Checkpoint,
    device: torch.device,
    *,
    source: ClipConfig | None = None,
    networks: Mapping[str, Network] = MappingProxyType({}),
) -> TorchEngine:
    """A tuned clip on its base, which is there already; another clip's values give way to this one's."""
    models.put_values(sd.unet, tuned.values)
    _check_latents(sd, tuned)
    modules = [module for one in networks.values() if (module := getattr(one, "module", None)) is not None]
    info = tuned.info
    eager.check_editing(sd, info.network_frames, info.height, info.width, networks=modules)
    return TorchEngine(
        sd=sd,
        info=tuned.info,
        source_latents=models.at_least_float32(tuned.source_latents.to(device)),
        inverted_latents=models.at_least_float32(tuned.inverted_latents.to(device)),
        sound=tuned.sound,
        source=source,
        networks=networks,
    )


def _source(clip: ClipFolder) -> ClipConfig | None:
    """The note that tuning keeps of it; raises InputError where that is no such note."""
    note = clip.settings.get("source")
    try:
        return None if note is None else ClipConfig(**note)
    except TypeError:
        raise InputError(f"{clip.path / clip.file}: its source {note!r:.100} is not what tuning writes") from None


def load_networks(
    sd: models.StableDiffusion, controlnets: Mapping[str, PathLike], adapters: Mapping[str, PathLike]
) -> dict[str, Network]:
    """ControlNets and adapters by name, beside the base's UNet; raises InputError for one that is not for it."""
    found: dict[str, Network] = {}
    if twice := sorted(set(controlnets) & set(adapters)):
        raise InputError(f"{twice[0]!r} names a ControlNet and an adapter: each needs a name of its own")
    for name, place in controlnets.items():
        net = models.placed(
            controlnet.load(network_files.found(place), sd.unet.config, sd.vae_factor), sd.unet.device, sd.unet.dtype
        )
        run, see = (framewise.in_eager(one, one.names) for one in (net, net.hint))
        found[name] = framewise.ControlNet(run=run, see=see, names=net.names, module=net)
    for name, place in adapters.items():
        adapter = models.placed(
            t2i_adapter.load(network_files.found(place), sd.unet.config, sd.vae_factor), sd.unet.device, sd.unet.dtype
        )
        run = framewise.in_eager(adapter, adapter.names)
        found[name] = framewise.Adapter(run=run, names=adapter.names, module=adapter)
    return found


def _check_latents(sd: models.StableDiffusion, tuned: checkpoint.Checkpoint) -> None:
    """Raises InputError where a clip's latents are not what its model makes of frames of its size."""
    info, factor = tuned.info, sd.vae_factor
    expected = (1, sd.unet.config.in_channels, info.frames, info.height // factor, info.width // factor)
    if (shape := tuple(tuned.source_latents.shape)) != expected:
        raise InputError(f"latents {shape}, but the model makes {expected} of the clip's frames")


class ModelOfBase:
    """The model of an exported base, found and hashed once for the reason, the memory and the opening."""

    _found: Base | None = None

    def _model(self, info: ClipInfo) -> Base:
        self._found = self._found or base_of(info)
        return self._found

    def why_not(self, _folder: Path, info: ClipInfo, _device: torch.device) -> str | None:
        """Why eager PyTorch, which needs the model itself, cannot serve the base; None where it can."""
        try:
            self._model(info)
        except InputError as error:
            return str(error)
        return None

    def needed_bytes(self, _folder: Path, info: ClipInfo, _device: torch.device) -> int:
        """What opening it takes in memory."""
        return sum(file.stat().st_size for files in self._model(info).files.values() for file in files)

    def open(self, folder: Path, info: ClipInfo, device: torch.device, _threads: int | None = None) -> TorchGraphs:
        return TorchGraphs(folder, models.load(self._model(info), device=device), info)


class TorchGraphs:
    """The parts of the base model itself as functions; see `exported.Graphs`."""

    frames_at_once = 8
    has_threads = False
    made_by = "--target onnx or compiled, which run networks as graphs: eager PyTorch takes a checkpoint's"

    def __init__(self, folder: Path, sd: models.StableDiffusion, info: ClipInfo) -> None:
        self.device, self._info, self._sd = sd.unet.device, info, sd
        self._specs = specs.read(folder) | specs.added(folder)
        self.revision = f"{torch.__version__}"
        self._parts: dict[str, nn.Module] = {
            "text_encoder": TextEncoder(sd.text_encoder),
            "vae_encoder": VaeEncoder(sd.vae),
            "unet": ClipUNet(sd.unet),
            "vae_decoder": VaeDecoder(sd.vae),
        }
        self._parts |= {
            name: ClipUNet(sd.unet, spec.further, gives_features=spec.gives_features)
            for name, spec in specs.added(folder).items()
            if spec.is_unet
        }
        self._lock = threading.Lock()  # a clip's values take the place of the model's own during a call

    def of_clip(self, values: Mapping[str, Tensor]) -> tuple[Mapping[str, Call], int]:
        own = {name: value.to(self.device, torch.float32) for name, value in values.items()}
        calls: dict[str, Call] = {name: partial(self._run, self._specs[name], own) for name in self._parts}
        return calls, sum(value.nbytes for value in own.values())

    @torch.no_grad()
    def _run(self, spec: GraphSpec, own: dict[str, Tensor], **inputs: Tensor) -> dict[str, Tensor]:
        moved = [inputs[one.name].to(self.device) for one in spec.inputs]
        values = {parameter: own[value.name] for parameter, value in spec.values.items()}
        with self._lock:
            return spec.by_name(self._parts[spec.name](*moved, **({"values": values} if values else {})))

    def extra_bytes(self, items: Mapping[str, int]) -> int:
        info = self._info
        beyond = eager.working_bytes(self._sd, info.network_frames, info.height, info.width)  # of one guided prompt
        rows = max((count for name, count in items.items() if self._specs[name].is_unet), default=0)
        return beyond * max(1, rows // 2)
