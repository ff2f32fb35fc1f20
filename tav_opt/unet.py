"""Inflation: an unmodified image UNet of diffusers becomes a video UNet (paper section 3.2).

No module is told the number of frames as context: each derives it from the shapes it is given, frames in the batch
over clips in the text or in the time embedding. That survives gradient checkpointing, tracing and a dynamic batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers import Transformer2DModel
from torch import Tensor, nn

from tav_opt import outermost, upsampling
from tav_opt.attention import VideoTransformerBlock
from tav_opt.base.configuration import check_unet
from tav_opt.conditions.attention_control import Control
from tav_opt.config import InputError
from tav_opt.kernels.group_norm import group_norm, in_onnx
from tav_opt.kernels.inputs import on_kernel


class ClipGroupNorm(nn.GroupNorm):
    """GroupNorm with statistics pooled over all frames of a clip, as the reference's norms over (c f h w) are."""

    frames: int = 1

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.GroupNorm's own name)
        return self.over(input, self.frames)

    def over(self, x: Tensor, frames: int, *, silu: bool = False) -> Tensor:
        """x (b f) c h w → the same shape, through SiLU if asked; where its channels come last, nothing is copied."""
        return group_norm(x, self.weight, self.bias, frames, self.num_groups, self.eps, silu=silu)


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm of each frame, as the image model has it, as clips of one frame where that is a kernel, or a node."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.GroupNorm's own name)
        if in_onnx() or on_kernel(input):
            return group_norm(input, self.weight, self.bias, 1, self.num_groups, self.eps)
        return super().forward(input)


class VideoResnetBlock(ResnetBlock2D):
    """A resnet of Stable Diffusion (no resampling, additive time embedding) over the frames of clips."""

    norm1: ClipGroupNorm
    norm2: ClipGroupNorm

    def forward(self, input_tensor: Tensor, temb: Tensor, *_: Any, **__: Any) -> Tensor:
        """input_tensor (b f) c h w, temb (b, d) one row a clip → (b f) c' h w."""
        frames = input_tensor.shape[0] // temb.shape[0]
        x = self.conv1(self._activated(self.norm1, input_tensor, frames))
        time = self.time_emb_proj(self.nonlinearity(temb)).repeat_interleave(frames, 0)  # (b f) c'
        x = self.conv2(self.dropout(self._activated(self.norm2, x + time[:, :, None, None], frames)))
        residual = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (residual + x) / self.output_scale_factor

    def _activated(self, norm: ClipGroupNorm, x: Tensor, frames: int) -> Tensor:
        """The norm and what follows it, in one where that is SiLU."""
        if isinstance(self.nonlinearity, nn.SiLU):
            return norm.over(x, frames, silu=True)
        return self.nonlinearity(norm.over(x, frames))


class VideoGEGLU(GEGLU):
    """diffusers' GEGLU by a product for each half: neither is cut out of a tensor twice as wide, nor copied for it."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """hidden_states … c → … c', Shazeer 2020 (arXiv 2002.05202), section 2."""
        halves = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        value, gate = (F.linear(hidden_states, weight, bias) for weight, bias in halves)
        return value * self.gelu(gate)


class VideoUNet(UNet2DConditionModel):
    """The inflated UNet: predicts the noise (or v) of clips."""

    def get_time_embed(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """One row a clip, though the sample's batch is frames."""
        return super().get_time_embed(sample[: timestep.shape[0]], timestep)

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        *,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        features: Tensor | None = None,
        gives_features: bool = False,
        **control: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """latents (b,c,f,h,w), timesteps (b,), text (b,tokens,width) → noise or v (b,c,f,h,w), in the UNet's dtype.

        What is added inside, each (b,f,c',h',w'), enters where diffusers' UNet takes it, by the name that it has there.
        With the tensors of attention control, by their names, there is one channel more: where the blend words look.
        Where it `gives_features`, it answers with those of `outermost.whole` too, (b,f,c',h,w); told of such `features`
        it runs its outermost layers alone. Raises ValueError where it is told of anything else beside the text then.
        """
        dtype = self.conv_in.weight.dtype
        if latents.dtype != dtype or text.dtype != dtype:
            latents, text = latents.to(dtype), text.to(dtype)
        b, c, f, h, w = latents.shape
        self.conv_norm_out.frames = f  # called by diffusers with the image alone, and never inside a checkpoint
        x = latents.transpose(1, 2).reshape(b * f, c, h, w)
        added = down_block_additional_residuals, mid_block_additional_residual, down_intrablock_additional_residuals
        if (features is not None or gives_features) and (control or any(one is not None for one in added)):
            raise ValueError("features go with the text alone")
        if features is not None:
            noise = outermost.shallow(self, x, timesteps, text, features.to(dtype).flatten(0, 1))
            return noise.reshape(b, f, -1, h, w).transpose(1, 2)
        if gives_features:
            noise, features = outermost.whole(self, x, timesteps, text)
            return noise.reshape(b, f, -1, h, w).transpose(1, 2), features.unflatten(0, (b, f))
        controlled = Control.of(control, dtype, (h, w)) if control else None
        mid = mid_block_additional_residual
        noise = super().forward(
            x,
            timesteps,
            text,
            cross_attention_kwargs={"control": controlled} if controlled else None,
            down_block_additional_residuals=_of_frames(down_block_additional_residuals, dtype),
            mid_block_additional_residual=None if mid is None else mid.to(dtype).flatten(0, 1),
            down_intrablock_additional_residuals=_of_frames(down_intrablock_additional_residuals, dtype),
            return_dict=False,
        )[0]
        noise = noise.reshape(b, f, -1, h, w).transpose(1, 2)
        return torch.cat([noise, controlled.where_words_look()], 1) if controlled else noise


def _of_frames(residuals: Sequence[Tensor] | None, dtype: torch.dtype) -> Any:
    """Each (b,f,c,h,w) → (b f) c h w; a list, which diffusers takes apart."""
    return None if residuals is None else [residual.to(dtype).flatten(0, 1) for residual in residuals]


def arguments(told: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors by name as keyword arguments of the UNet: `name.0`, `name.1`, … are the sequence that is one argument."""
    found: dict[str, Any] = {}
    for name, tensor in told.items():
        argument, dot, _ = name.rpartition(".")
        if dot:
            found.setdefault(argument, []).append(tensor)
        else:
            found[name] = tensor
    return found


def inflate(unet: UNet2DConditionModel) -> VideoUNet:
    """Swaps five parts of a loaded image UNet, in place; parameter names stay the reference's.

    Attention over frames 0 and i-1, text per clip, temporal attention, norms over the clip, one time row per clip
    (paper section 3.2, figure 4). Raises InputError, naming the setting, for UNets that are not of the SD 1.x/2.x kind.
    """
    check_unet(unet.config, "UNet")
    for module in list(unet.modules()):
        if isinstance(module, BasicTransformerBlock):
            module.__class__ = VideoTransformerBlock
            cast(VideoTransformerBlock, module).inflate()
        elif isinstance(module, ResnetBlock2D):
            module.__class__ = VideoResnetBlock
            module.norm1.__class__ = module.norm2.__class__ = ClipGroupNorm
        elif isinstance(module, Transformer2DModel):
            module.norm.__class__ = FrameGroupNorm
        elif isinstance(module, GEGLU):
            module.__class__ = VideoGEGLU
    upsampling.fuse(unet)
    unet.conv_norm_out.__class__ = ClipGroupNorm
    unet.__class__ = VideoUNet
    return cast(VideoUNet, unet)


def trained_names(unet: nn.Module, trainable: Iterable[str]) -> list[str]:
    """Names of the parameters that train: those inside a module whose path ends in one of `trainable`.

    Raises InputError for an entry that names nothing.
    """
    names = [name for name, _ in unet.named_parameters()]
    for suffix in trainable:
        if not any(f".{suffix}." in f".{name}" for name in names):
            raise InputError(
                f"trainable: no parameter of the UNet lies in {suffix!r} (e.g. attn1.to_q, attn2.to_q, attn_temp)"
            )
    return [name for name in names if any(f".{suffix}." in f".{name}" for suffix in trainable)]


def clip_value_names(unet: nn.Module, trainable: Iterable[str]) -> list[str]:
    """Names of a clip's own values: what trained, and what the image model lacks (attn_temp, norm_temp)."""
    own = set(trained_names(unet, trainable)) | {n for n, _ in unet.named_parameters() if "_temp." in n}
    return [name for name, _ in unet.named_parameters() if name in own]
