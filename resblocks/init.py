"""How weights start: one rule for each kind of layer, drawn in the order in which the layers were made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

Draw = Callable[[nn.Module], object]  # sets parameters of one layer in place


def init_layer(layer: nn.Module, draw: Draw | None = None) -> None:
    """Draw the parameters of one layer: torch's convolutions as He et al. 2015 ("Delving deep"), others by their rule.

    Without a bias a norm follows, as a rule, and fan out keeps the size of the gradient (but for groups, which torch's
    fan out does not know, as in torchvision); a biased convolution has no norm behind it, and fan in keeps the size of
    the map, which would fade over many layers. The gain is that of ReLU, whatever the activation: without norms, maps
    behind others fade or grow. A weight that is computed, by a parametrization or pruning, is drawn like
    any other. What `draw` sets after that counts.
    """
    if parametrize.is_parametrized(layer, "weight"):
        with torch.no_grad(), parametrize.cached():
            _draw(layer, draw)  # into the computed weight, which the cache keeps
            drawn: Any = layer.weight
            drawn = drawn.clone()
        if _can_be_set(layer.get_submodule("parametrizations.weight")):
            layer.weight = drawn
        return
    original = layer._parameters.get("weight_orig")
    if original is not None:  # what hooks of torch.nn.utils.prune and spectral_norm compute the weight from
        layer.weight = original.detach()
    _draw(layer, draw)


def draw_like_torch(layer: nn.Module) -> None:
    """Draw a convolution as torch itself does, a value for the argument `draw` of `init_weights`.

    Weights and bias are uniform in +- 1 / sqrt(fan_in): weights that are smaller than our rule's by a factor of 2.4
    where channels and positions stay the same, so that before a batch norm the same learning rate moves them further.
    """
    if isinstance(layer, _ConvNd):
        layer.reset_parameters()


def init_new_layers(module: nn.Module) -> None:
    """Draw the parameters of what the library and torch have just made; the rest starts as its constructor left it."""
    for layer in dict.fromkeys(_children_first(module, _has_known_constructor)):
        init_layer(layer)


def draws_all(module: nn.Module) -> bool:
    """Whether `init_new_layers` draws every parameter of it, so that what its constructor drew does not count."""
    drawn = set(_children_first(module, _has_known_constructor))
    return all(_is_drawn(layer) if layer in drawn else not _own_parameters(layer) for layer in module.modules())


def _has_known_constructor(layer: nn.Module) -> bool:
    return type(layer).__init__.__module__.partition(".")[0] in ("torch", "resblocks")


def _is_drawn(layer: nn.Module) -> bool:
    if isinstance(layer, parametrize.ParametrizationList):
        return _can_be_set(layer)
    own = _own_parameters(layer)
    return not own or (callable(getattr(layer, "reset_parameters", None)) and "weight_g" not in own)


def _own_parameters(layer: nn.Module) -> list[str]:
    return [name for name, parameter in layer._parameters.items() if parameter is not None]


def _can_be_set(parametrizations: nn.Module) -> bool:
    return all(hasattr(step, "right_inverse") for step in parametrizations.children())


def _draw(layer: nn.Module, draw: Draw | None) -> None:
    reset = getattr(layer, "reset_parameters", None)
    if callable(reset):
        reset()
    if isinstance(layer, _ConvNd) and type(layer).reset_parameters is _ConvNd.reset_parameters:
        mode: Literal["fan_in", "fan_out"] = "fan_out" if layer.bias is None else "fan_in"
        nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if draw is not None:
        with torch.no_grad():
            draw(layer)


def init_weights(module: nn.Module, draw: Draw | None = None) -> None:
    """Draw all parameters and reset all buffers, as construction does: under one seed both give the same weights.

    That holds for what the library makes; a block or layer of your own starts as its constructor leaves it, and what
    torch's layers in it hold is drawn by our rule here. It is the way from `device="meta"` and `to_empty` to a net that
    can train. A layer of your own takes part through its `reset_parameters()`, which comes after those of the layers
    inside it and may set them too. Trained weights are loaded into a net that is built: what a layer loads while it is
    made is drawn anew.

    Args:
        module: a net, or a part of one.
        draw: a rule of your own or `draw_like_torch`: called with each layer after our rule, those inside it first, to
            set its parameters in place. Starts such as `ZeroInit` and `Fixup` come after all draws.

    Raises:
        ValueError: `draw` is no function.
    """
    if draw is not None and not callable(draw):
        raise ValueError(f"draw must be a function of a layer, which sets its parameters, got {draw!r}")
    init_layers(module, draw)
    start_weights(module)


def init_layers(module: nn.Module, draw: Draw | None = None) -> None:
    """Draw the parameters of all layers, each after those inside it."""
    for layer in dict.fromkeys(_children_first(module)):
        init_layer(layer, draw)


def start_weights(module: nn.Module) -> None:
    """Let each module that has a `start_weights` of its own set what it starts with beyond the draw."""
    for layer in module.modules():
        start = getattr(layer, "start_weights", None)
        if callable(start):
            start()


def _children_first(module: nn.Module, within: Callable[[nn.Module], bool] = lambda _: True) -> Iterator[nn.Module]:
    """The module and all in it, without those that are not within and what they hold."""
    if within(module):
        for child in module.children():
            yield from _children_first(child, within)
        yield module
