"""How a tensor of a source becomes one of a net with other input channels or more dimensions."""

from __future__ import annotations

from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

FirstConv = Literal["same", "sum", "repeat"]
Inflate = Literal["centre", "mean"]


def inflated(kernel: Tensor, wanted: torch.Size, how: Inflate | None) -> Tensor:
    """A kernel with new dimensions before its own, as many as are wanted; itself where none are."""
    new = wanted[2 : 2 + len(wanted) - kernel.dim()]
    if how is None or kernel.dim() < 3 or not new or not kernel.is_floating_point():
        return kernel
    kernel = widened(kernel)
    channels, plane = kernel.shape[:2], kernel.shape[2:]
    if how == "mean":
        return kernel.reshape(*channels, *[1] * len(new), *plane).expand(*channels, *new, *plane) / prod(new)
    middle: list[Any] = [slice(None), slice(None), *(size // 2 for size in new)]
    out = kernel.new_zeros((*channels, *new, *plane))
    out[tuple(middle)] = kernel
    return out


def widened(kernel: Tensor) -> Tensor:
    """The kernel in at least float32: to compute in fewer digits would lose some."""
    return kernel.float() if kernel.dtype.itemsize < 4 else kernel


def shape_there(tensor: Tensor, given: Tensor) -> torch.Size:
    """Our tensor's shape in the source, where our linear layers may be 1x1 convolutions."""
    pointwise = tensor.dim() == 2 and set(given.shape[2:]) == {1}
    return torch.Size([*tensor.shape, *given.shape[2:]]) if pointwise else tensor.shape


def fit_first_conv(kernel: Tensor, wanted: torch.Size, how: str) -> tuple[Tensor, str | None]:
    """The first kernel for another number of input channels, and what was done to it."""
    if how not in ("same", "sum", "repeat"):
        raise ValueError(f"first_conv must be same, sum or repeat, got {how!r}")
    if how == "same" or kernel.dim() < 3 or kernel.shape[1] == wanted[1] or not kernel.is_floating_point():
        return kernel, None
    kernel = widened(kernel)
    had, wants = kernel.shape[1], wanted[1]
    if how == "sum":
        if wants != 1:
            raise ValueError(f"first_conv='sum' needs a net with in_channels=1, got in_channels={wants}")
        return kernel.sum(1, keepdim=True), f"its {had} input channels summed to 1"
    channels = [channel % had for channel in range(wants)]
    return kernel[:, channels] * (had / wants), f"its {had} input channels repeated to {wants}, times {had}/{wants}"


def misfit(name: str, fitted: Tensor, given: Tensor, wanted: torch.Size, tensor: Tensor) -> str | None:
    """Why a tensor of the source, fitted as far as that goes, cannot become one of the net, or None."""
    if tensor.is_floating_point() and not given.is_floating_point():
        return f"dtype: {name} is {tensor.dtype} in the net and {given.dtype} in the source"
    if fitted.shape != wanted:
        return f"shape: {name} is {tuple(wanted)} in the net and {tuple(given.shape)} in the source"
    return None


def narrowed(given: Tensor, tensor: Tensor) -> str | None:
    """What is lost of the digits of a tensor of the source, or None."""
    less = given.is_floating_point() and given.dtype.itemsize > tensor.dtype.itemsize
    return f"rounded from {given.dtype} to {tensor.dtype}" if less else None
