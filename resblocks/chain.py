"""Layers in a row: what leaves a batch norm and only its activation reads is written over, or rebuilt in backward.

Hooks see the value that left a layer, so nothing of this is done where somebody looks on (`resblocks.watched`). Small
maps take less time than the calls of modules; so what does nothing is not called, and the checks are few.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resblocks.layers import batch_norm
from resblocks.rebuild import Rebuild, is_repeatable, may_rebuild
from resblocks.watched import is_watched


def run_layers(layers: nn.Module, x: Tensor, rebuild: Rebuild | None = None) -> Tensor:
    """`layers(x)`, where nobody traces. A ReLU behind a batch norm takes over its buffer.

    Args:
        rebuild: what keeps the norm's input alone for backward; None keeps the activation.
    """
    if is_silent(layers):
        return x
    if rebuild is not None:
        return _run_rebuilding(layers, x, rebuild)
    if type(layers) is not nn.Sequential or is_watched(layers):
        out: Tensor = layers(x)
        return out
    owned = False
    for layer in layers:
        x = activate(layer, x, owned=owned)
        owned = is_fresh(layer)
    return x


def _run_rebuilding(layers: nn.Module, x: Tensor, rebuild: Rebuild) -> Tensor:
    if type(layers) is not nn.Sequential or is_watched(layers):
        return rebuild.call(layers, x)
    norm, norm_input = None, x
    for layer in layers:
        if norm is not None and may_rebuild(norm, layer):
            x, norm = rebuild.activate(norm, layer, norm_input, x), None
        elif is_repeatable(layer):
            norm, norm_input, x = layer, x, layer(x)
        else:
            norm, x = None, rebuild.call(layer, x)
    return x


def activate(act: nn.Module, x: Tensor, *, owned: bool) -> Tensor:
    """`act(x)`, in the buffer of x if nobody else reads it."""
    out: Tensor = torch.relu_(x) if owned and type(act) is nn.ReLU and not is_watched(act) else act(x)
    return out


def is_silent(part: nn.Module) -> bool:
    """Whether the part does nothing and nobody would notice that it is not called."""
    return type(part) is nn.Identity and not is_watched(part)


def is_fresh(norm: nn.Module) -> bool:
    """Whether what the norm puts out may be written over: batch norm makes a new tensor and does not keep it."""
    return type(norm) in batch_norm and not is_watched(norm)


def ends_fresh(branch: nn.Module) -> bool:
    """Whether what the branch puts out may be written over."""
    if type(branch) is not nn.Sequential or is_watched(branch):
        return False
    last = next(reversed(branch._modules.values()), None)
    return last is not None and is_fresh(last)
