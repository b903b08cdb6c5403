"""Layers in a row: what leaves a batch norm and only its activation reads is written over, or rebuilt in backward.

Hooks see the value that left a layer, so nothing of this is done where somebody looks on (`resblocks.watched`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resblocks.rebuild import BATCH_NORMS, Rebuild, may_rebuild
from resblocks.watched import is_watched


def run_layers(layers: nn.Module, x: Tensor, rebuild: Rebuild | None = None) -> Tensor:
    """`layers(x)`, where nobody traces. An activation behind a norm takes over its buffer.

    Args:
        rebuild: what keeps the norm's input alone for backward; None keeps the activation.
    """
    if type(layers) is not nn.Sequential or is_watched(layers):
        out: Tensor = layers(x)
        return out
    norm, norm_input = None, None
    for layer in layers:
        if rebuild is not None and norm is not None and norm_input is not None and may_rebuild(norm, layer):
            x, norm_input = rebuild.activate(norm, layer, norm_input, x), None
        elif norm is not None and is_fresh(norm):
            x = activate(layer, x, owned=True)
        else:
            norm_input = None if rebuild is None else x  # kept no longer than backward keeps it anyway
            x = layer(x)
        norm = layer
    return x


def activate(act: nn.Module, x: Tensor, *, owned: bool) -> Tensor:
    """`act(x)`, in the buffer of x if nobody else reads it."""
    out: Tensor = torch.relu_(x) if owned and type(act) is nn.ReLU and not is_watched(act) else act(x)
    return out


def is_fresh(norm: nn.Module) -> bool:
    """Whether what the norm puts out may be written over: batch norm makes a new tensor and does not keep it."""
    return type(norm) in BATCH_NORMS and not is_watched(norm)


def ends_fresh(branch: nn.Module) -> bool:
    """Whether what the branch puts out may be written over."""
    return type(branch) is nn.Sequential and len(branch) > 0 and is_fresh(branch[-1]) and not is_watched(branch)
