"""Whether a net of ours computes what a model of another library computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resblocks.interop.weights import find_names


def differences(net: nn.Module, model: nn.Module, x: Tensor) -> dict[str, float]:
    """How far our net and a model with the same weights are apart, each as norm of the difference over the norm.

    The gradients are those of a random weighted sum of the logits, in training mode. Weights, statistics and modes
    of both are afterwards what they were.

    Args:
        net: our net, loaded from the model.
        model: of torchvision or timm.
        x: an input of both.

    Returns:
        "logits" in evaluation mode, "train_logits" in training mode, "gradients" the largest of all weights, and
        "input_gradient".
    """
    theirs = find_names(net, model.state_dict(), None).theirs
    with _unchanged(net), _unchanged(model), torch.no_grad():
        logits = [module.eval()(x) for module in (net, model)]
    ours = _gradients(net, x)
    others = _gradients(model, x)
    return {
        "logits": _apart(*logits),
        "train_logits": _apart(ours["logits"], others["logits"]),
        "gradients": largest([_apart(ours[key], others[theirs[key]]) for key, _ in net.named_parameters()]),
        "input_gradient": _apart(ours["input"], others["input"]),
    }


def largest(values: list[float]) -> float:
    """The largest value, or NaN where one is NaN, which Python's `max` passes over."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def _gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    names, weights = zip(*module.named_parameters(), strict=True)
    with _unchanged(module):
        logits = module.train()(leaf)
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        found = torch.autograd.grad(logits, [leaf, *weights], direction)
    return {"logits": logits.detach(), **dict(zip(("input", *names), found, strict=True))}


def _apart(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours - theirs.reshape(ours.shape)).norm() / theirs.norm().clamp_min(torch.finfo(theirs.dtype).tiny)
    return float(difference)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    modes = [(child, child.training) for child in module.modules()]
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
