"""An attention as one torch op: its Triton kernels on CUDA, forward and backward, its naive twin elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from tav_opt.kernels.inputs import check, on_kernel

Attention = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
"""q, k, v (b f) n c, frames, heads → (b f) n c."""
Launch = Callable[..., Tensor]
"""As Attention; `traced=True` where a compiler shall see the kernel itself."""
Gradients = tuple[Tensor, Tensor, Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Gradients]
"""The result's gradient, q, k, v, frames, heads → the gradients of q, k, v."""


def register(
    name: str, twin: Attention, launch: Launch, fits: Callable[[Tensor, int], bool], backward: Backward
) -> None:
    """Registers `tav_opt::<name>`, which runs its kernel where it has one that fits (q, frames).

    Its gradients come from `backward` there, and elsewhere from the naive twin, computed again.

    Exporters see the one op. On CUDA, compilers see the kernel inside it and compile it into their program, as for
    `torch.library.triton_op`; that function itself would do so on processors too, and it imports PyTorch's compiler,
    which takes longer than all else that a server's worker loads.
    """

    def kernel_fits(q: Tensor, frames: int) -> bool:
        return on_kernel(q) and fits(q, frames)

    def run(q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Tensor:
        check(q, k, v, frames, heads)
        if not kernel_fits(q, frames):
            return twin(q, k, v, frames, heads).contiguous()
        with torch.cuda.device_of(q):  # Triton launches on the current device, whichever holds the tensors
            return launch(q, k, v, frames, heads)

    def decompose(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        q, frames = args[0], args[3]
        if custom_triton_ops_decomposition_disabled() or q.device.type != "cuda" or not fits(q, frames):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return launch(*args, **(kwargs or {}), traced=True)

    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        differentiated = backward if kernel_fits(q, ctx.frames) else partial(through, twin)
        return *differentiated(grad, q, k, v, ctx.frames, ctx.heads), None, None

    op = torch.library.custom_op(f"tav_opt::{name}", run, mutates_args=())
    op.register_fake(lambda q, k, v, frames, heads: q.new_empty(q.shape))
    op.register_autograd(gradients, setup_context=_keep_inputs)
    op.register_torch_dispatch(FunctionalTensorMode, decompose)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.frames, ctx.heads = inputs
    ctx.save_for_backward(q, k, v)


def through(twin: Attention, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int) -> Gradients:
    """The gradients by way of the naive twin, computed again."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = twin(q, k, v, frames, heads)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    return dq, dk, dv


def register_backward(name: str, run: Callable[..., Gradients]) -> None:
    """Registers `tav_opt::<name>`, the kernels that compute the gradients of its first q, k, v, opaque to compilers."""
    op = torch.library.custom_op(f"tav_opt::{name}", run, mutates_args=())
    op.register_fake(lambda _grad, q, *_: tuple(q.new_empty(q.shape) for _ in range(3)))
