"""Dense blocks and transitions by operators whose gradients autograd can differentiate and batch.

The backward of `resblocks.dense` is no such operator. Where a gradient of the gradient is asked for, or gradients of
several outputs at once, the block is computed once more by these, from its input and with its dropout masks, and
autograd does the rest, in the memory of a plain block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from resblocks.dense_plan import Plan, geometry

aten = torch.ops.aten


def is_differentiated(grad: Tensor) -> bool:
    """Whether backward is recorded (create_graph=True), or given several gradients at once (is_grads_batched=True)."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def gradients_of(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of what `run` makes of the inputs, None for those that are not wanted."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        ends = [tensor.view_as(tensor) for tensor in inputs]  # where autograd stops, before the block that asks
        out = run(*ends)
    chosen = [end for end, want in zip(ends, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(out, chosen, grad, create_graph=create_graph))
    return [next(found) if want else None for want in wanted]


def plain_block(plan: Plan, masks: Iterable[Tensor | None], x: Tensor, *params: Tensor) -> Tensor:
    """The maps of a dense block in training mode; running statistics are left alone."""
    weights, maps = iter(params), x
    for layer, mask in zip(plan.layers, masks, strict=True):
        y = maps
        for norm, conv in layer.steps:
            gamma, beta, weight = next(weights), next(weights), next(weights)
            z = _rectified_norm(y, gamma, beta, norm.eps).to(plan.compute)
            y = aten.convolution(z, weight.to(plan.compute), None, *geometry(conv))
        if mask is not None:
            y = y * mask / (1 - layer.dropout)
        maps = torch.cat([maps, y.to(maps.dtype)], 1)
    return maps


def plain_pool(eps: float, size: int, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The average over windows of relu(norm(x))."""
    return average(_rectified_norm(x, gamma, beta, eps).to(x.dtype), size)


def average(x: Tensor, size: int) -> Tensor:
    """Over windows of that size in each direction, side by side."""
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[x.dim() - 3]
    return pool(x, size)


def _rectified_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """In the dtype of the norm, at least float32, since a norm of two dtypes has no second derivative."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return functional.batch_norm(x.to(wide), None, None, gamma.to(wide), beta.to(wide), True, 0.0, eps).relu()
