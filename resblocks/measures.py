"""Tensors as numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def scalar(loss: object) -> Tensor:
    """The value of a loss.

    Raises:
        ValueError: it has not one value.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must return a tensor with one value, got {got}")
    return loss


def wide(x: Tensor) -> Tensor:
    """In float64: squares of values that vanish or explode leave the range of float32."""
    x = x.detach().cpu() if x.device.type == "mps" else x.detach()  # which has no float64
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def variance_of(x: Tensor) -> float:
    """Over all entries."""
    return float(wide(x).var(correction=0))


def norm_of(x: Tensor | None) -> float:
    """Euclidean, 0 of a gradient that is not there."""
    return 0.0 if x is None else float(wide(x).norm())
