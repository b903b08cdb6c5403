"""Whether a net of ours computes what a model of another library computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resblocks.interop.weights import Vocabulary, find_names
from resblocks.undisturbed import restored, unwrapped


def differences(
    net: nn.Module, model: nn.Module, x: Tensor, *, vocabulary: Vocabulary | None = None
) -> dict[str, float]:
    """How far our net and a model with the same weights are apart, each as norm of the difference over the norm.

    The gradients are those of a random weighted sum of the logits, in training mode, of frozen parameters too. Both
    nets draw from the same random numbers, so that dropout masks the same values where it draws in the same order.
    Weights, statistics, modes and torch's generator are afterwards what they were.

    Args:
        net: our net, loaded from the model.
        model: of another library; it puts out a tensor, or as transformers do something with `logits` or, without a
            head, `pooler_output`.
        x: an input of both.
        vocabulary: whose names the model has, as in `load`.

    Raises:
        ValueError: no names in common, no parameters, or another output.

    Returns:
        "logits" in evaluation mode, "train_logits" in training mode, "gradients" the largest of all weights that are
        parameters of both, and "input_gradient".
    """
    net, model = unwrapped(net), unwrapped(model)
    theirs = find_names(net, model.state_dict(), vocabulary).theirs
    with restored(net), restored(model), torch.no_grad():
        logits = [logits_of(module.eval()(x)) for module in (net, model)]
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), torch.enable_grad():
        ours = _gradients(net, x)
        others = _gradients(model, x)
    shared = [key for key, _ in net.named_parameters() if theirs[key] in others]
    if not shared:
        raise ValueError(f"net and model must share parameters, got {type(net).__name__} and {type(model).__name__}")
    return {
        "logits": _apart(*logits),
        "train_logits": _apart(ours["logits"], others["logits"]),
        "gradients": largest([_apart(ours[key], others[theirs[key]]) for key in shared]),
        "input_gradient": _apart(ours["input"], others["input"]),
    }


def logits_of(output: object) -> Tensor:
    """The tensor in the output of a model."""
    found = [output, *(getattr(output, name, None) for name in ("logits", "pooler_output"))]
    for value in found:
        if isinstance(value, Tensor):
            return value
    raise ValueError(f"model must put out a tensor, or logits or pooler_output, got {type(output).__name__}")


def largest(values: list[float]) -> float:
    """The largest value, or NaN where one is NaN, which Python's `max` passes over."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def _gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    names, weights = zip(*module.named_parameters(), strict=True)
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        with restored(module):
            for weight in frozen:
                weight.requires_grad_()
            torch.manual_seed(0)
            logits = logits_of(module.train()(leaf))
            direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
            # Zero where nothing depends on it: the projection of a shortcut that is switched off.
            found = torch.autograd.grad(logits, [leaf, *weights], direction, materialize_grads=True)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    return {"logits": logits.detach(), **dict(zip(("input", *names), found, strict=True))}


def _apart(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = (values.cpu().double() for values in (ours, theirs))  # squares of small values vanish in float32
    difference = (ours - theirs.reshape(ours.shape)).norm() / theirs.norm().clamp_min(torch.finfo(theirs.dtype).tiny)
    return float(difference)
