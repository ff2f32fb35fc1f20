"""Group norms over clips, SiLU inside, as torch ops: the Triton kernels on CUDA, the naive twin elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from tav_opt.config import InputError
from tav_opt.kernels import naive
from tav_opt.kernels.inputs import on_kernel

Norm = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, frames: int, groups: int, eps: float, *, silu: bool = False
) -> Tensor:
    """GroupNorm with statistics over all frames of a clip (Tune-A-Video's norms over (c f h w)), then SiLU if asked.

    x (b f) c h w → the same shape; weight, bias (c,). On CUDA its channels come last in memory, and so do the result's;
    an x of another layout is copied. In an ONNX graph it is one node, and else off CUDA standard operators, which
    every exporter knows. Raises InputError for shapes that do not fit.
    """
    if in_onnx():
        y = torch.ops.tav_opt.clip_group_norm(x, weight, bias, frames, groups, eps)
        return F.silu(y) if silu else y
    if on_kernel(x):
        return torch.ops.tav_opt.group_norm(x, weight, bias, frames, groups, eps, silu)[0]
    return naive.group_norm(x, weight, bias, frames, groups, eps, silu=silu)


def in_onnx() -> bool:
    """Whether an ONNX graph is being written."""
    return torch.onnx.is_in_onnx_export()


def _run_node(x: Tensor, weight: Tensor, bias: Tensor, frames: int, groups: int, eps: float) -> Tensor:
    return naive.group_norm(x, weight, bias, frames, groups, eps).contiguous()


def _check(x: Tensor, weight: Tensor, bias: Tensor, frames: int, groups: int) -> None:
    if x.ndim != 4 or not weight.shape == bias.shape == x.shape[1:2]:
        shapes = [tuple(tensor.shape) for tensor in (x, weight, bias)]
        raise InputError(f"x, weight, bias: (b f) c h w and twice c, not {shapes}")
    if not x.dtype == weight.dtype == bias.dtype or not x.device == weight.device == bias.device:
        kinds = [(str(tensor.dtype), str(tensor.device)) for tensor in (x, weight, bias)]
        raise InputError(f"x, weight, bias: one dtype and device, not {kinds}")
    if frames < 1 or x.shape[0] % frames:
        raise InputError(f"frames = {frames}: must divide the {x.shape[0]} rows of x")
    if groups < 1 or x.shape[1] % groups:
        raise InputError(f"groups = {groups}: must divide the {x.shape[1]} channels of x")


def _run(
    x: Tensor, weight: Tensor, bias: Tensor, frames: int, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, channels last, and the groups' means and reciprocal standard deviations, float32 (b, groups)."""
    _check(x, weight, bias, frames, groups)
    if not on_kernel(x):
        out = naive.group_norm(x, weight, bias, frames, groups, eps, silu=silu)
        return out.contiguous(memory_format=torch.channels_last), *naive.statistics(x, frames, groups, eps)
    from tav_opt.kernels.group_norm_kernel import launch  # Triton is imported where it runs, and not before

    with torch.cuda.device_of(x):
        return launch(x, weight.contiguous(), bias.contiguous(), frames, groups, eps, silu)


def _run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, frames: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, channels last, weight and bias."""
    from tav_opt.kernels.group_norm_backward import launch

    with torch.cuda.device_of(x):
        return launch(grad, x, weight.contiguous(), bias.contiguous(), mean, rstd, frames, silu)


def _through_twin(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, frames: int, groups: int, eps: float, silu: bool
) -> Gradients:
    """The gradients by way of the naive twin, computed again."""
    with torch.enable_grad():
        x, weight, bias = (tensor.detach().requires_grad_() for tensor in (x, weight, bias))
        out = naive.group_norm(x, weight, bias, frames, groups, eps, silu=silu)
    dx, of_weight, of_bias = torch.autograd.grad(out, (x, weight, bias), grad)
    return dx, of_weight, of_bias


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_op = torch.library.custom_op("tav_opt::group_norm", _run, mutates_args=())
_node = torch.library.custom_op("tav_opt::clip_group_norm", _run_node, mutates_args=())
_backward = torch.library.custom_op("tav_opt::group_norm_backward", _run_backward, mutates_args=())


@_node.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_op.register_fake
def _(x: Tensor, _weight: Tensor, _bias: Tensor, frames: int, groups: int, _eps: float, _silu: bool) -> Norm:
    mean, rstd = (x.new_empty(x.shape[0] // frames, groups, dtype=torch.float32) for _ in range(2))
    return _like(x), mean, rstd


@_backward.register_fake
def _(_grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Gradients:
    return _like(x), torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Norm) -> None:
    *tensors, ctx.frames, ctx.groups, ctx.eps, ctx.silu = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _gradients(ctx: Any, grad: Tensor, *_of_statistics: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    if on_kernel(x):
        found = torch.ops.tav_opt.group_norm_backward(grad, x, weight, bias, mean, rstd, ctx.frames, ctx.silu)
    else:
        found = _through_twin(grad, x, weight, bias, ctx.frames, ctx.groups, ctx.eps, ctx.silu)
    return *found, None, None, None, None


def _decompose(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """On CUDA compilers see the kernels themselves, as those of attention (op.py)."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    if custom_triton_ops_decomposition_disabled() or args[0].device.type != "cuda":
        return mode.__torch_dispatch__(op, types, args, kwargs)
    from tav_opt.kernels.group_norm_kernel import launch

    with mode:
        return launch(*args, **(kwargs or {}), traced=True)


_op.register_autograd(_gradients, setup_context=_keep)
_op.register_torch_dispatch(FunctionalTensorMode, _decompose)
