"""What the benchmarks have in common: which peers are installed, their weights, images, and with what was measured."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from resblocks.training.environment import environment

OPTIONAL = ("timm", "pytorchcv")  # the environment of a result names the other packages


def is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def made_with() -> dict[str, Any]:
    """The environment of a measurement on the CPU, with the versions of the peers."""
    made = environment(torch.device("cpu"))
    made["versions"] |= {package: metadata.version(package) for package in filter(is_installed, OPTIONAL)}
    return made


def same_weights(net: nn.Module, source: nn.Module) -> nn.Module:
    """The net with the tensors of another that has them in the same order under other names."""
    mine, theirs = net.state_dict(), source.state_dict()
    if [tensor.shape for tensor in mine.values()] != [tensor.shape for tensor in theirs.values()]:
        raise ValueError(f"net must have the tensors of {type(source).__name__} in its order, got {type(net).__name__}")
    net.load_state_dict(dict(zip(mine, theirs.values(), strict=True)))
    return net


def data(batch: int, size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random images and labels, the same each time."""
    generator = None if device == "meta" else torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, device=device, dtype=dtype, generator=generator)
    return x, torch.arange(batch, device=device) % 10


def verdict(gate: dict[str, Any]) -> str:
    """What the gate of a contestant found, in words."""
    if gate["passes"]:
        return "equal"
    return "batches counted twice" if gate["batches_counted"] != [1] else "different"
