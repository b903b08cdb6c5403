"""How weights start: one rule for each kind of layer, drawn in the order in which the layers were made."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd


def init_layer(layer: nn.Module) -> None:
    """Draw the parameters of one layer: of a convolution by He et al. 2015 (normal, fan out), else by its own rule."""
    reset = getattr(layer, "reset_parameters", None)
    if callable(reset):
        reset()
    if isinstance(layer, _ConvNd):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def init_weights(module: nn.Module) -> None:
    """Draw all parameters and reset all buffers, as construction does: under one seed both give the same weights.

    This is the way from `device="meta"` and `to_empty` to a net that can train. A layer of another library takes
    part through its `reset_parameters()`.
    """
    for layer in module.modules():
        init_layer(layer)
    for layer in module.modules():
        start_branch = getattr(layer, "start_branch", None)
        if callable(start_branch):
            start_branch()


def last_weight(branch: nn.Module) -> nn.Parameter:
    """The weight that scales what leaves the branch: of its last norm, or of its last convolution if that comes later.

    Raises:
        ValueError: no direct child of the branch named conv* or norm* has a weight.
    """
    names = [name for name, layer in branch.named_children() if name.startswith(("conv", "norm"))]
    weights = [getattr(branch.get_submodule(name), "weight", None) for name in names]
    found = [weight for weight in weights if isinstance(weight, nn.Parameter)]
    if not found:
        raise ValueError(f"zero_init needs a branch with a weight in its conv or norm layers, got {names}")
    return found[-1]
