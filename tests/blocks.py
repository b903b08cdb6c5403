"""What the tests of several modules share: the blocks, and inputs for them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import resblocks as rb

SUM_BLOCKS = {
    "basic": rb.BasicBlock,
    "bottleneck": rb.Bottleneck,
    "resnext": partial(rb.ResNeXtBlock, cardinality=2, base_width=32),
    "preact_basic": rb.PreActBasicBlock,
    "preact_bottleneck": rb.PreActBottleneck,
    "wide": rb.WideBlock,
}
DENSE_BLOCKS = {"dense_layer": rb.DenseLayer, "dense_block": partial(rb.DenseBlock, growth_rate=8)}
BLOCKS = SUM_BLOCKS | DENSE_BLOCKS


def image(channels: int = 16, size: int = 5, dims: int = 2, batch: int = 3, **kwargs: object) -> Tensor:
    """A random batch of maps of so many dimensions."""
    return torch.randn(batch, channels, *[size] * dims, **kwargs)


def count(net: nn.Module, kind: type[nn.Module]) -> int:
    """How many layers of exactly this type the net holds."""
    return sum(type(module) is kind for module in net.modules())


def trains_every_parameter(module: nn.Module, x: Tensor) -> Tensor:
    """Run forward and backward, and check that each parameter got a gradient; returns the output."""
    y = module(x)
    (y * torch.randn_like(y)).sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
    return y
