"""How alike gradients at neighbouring inputs are (Balduzzi et al. 2017, "The Shattered Gradients Problem")."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from resblocks.checks import check_steps
from resblocks.measures import wide
from resblocks.undisturbed import input_gradient


def gradient_correlation(
    net: nn.Module, x: Tensor, towards: Tensor, steps: Sequence[float], loss: Callable[[Tensor], Tensor]
) -> dict[float, list[float]]:
    """How alike the gradients at x and a step away from it are (Balduzzi et al. 2017, section 1.1 and figure 1).

    In a deep net without skips, before it is trained, they soon have nothing in common, as in white noise; with skips
    they stay alike for longer. Figure 1 has scalar inputs; here it is the cosine of the angle between the whole
    gradients, those of the loss with respect to the input. The net runs in the mode that it is in: one that was
    not trained has no running statistics yet, so take train mode, or `torch.optim.swa_utils.update_bn` before.

    Args:
        x: a batch of floating point numbers.
        towards: where each entry of the batch moves to, such as another image, or itself with noise.
        steps: parts of that way: 0 is x, 1 is `towards`.
        loss: maps the net's output to a scalar, by operations that autograd records.

    Returns:
        For each step a cosine from -1 to 1 for each entry of the batch; nan where a gradient is zero or not finite.

    Shape: x and `towards` are alike, (N, ...).

    Raises:
        ValueError: x of integers, or without entries; `towards` of another shape, or complex for a real x; steps that
            are no finite numbers; a loss that is no scalar, or cut off from the net's output.

    Example:
        >>> net, x, noise = nn.Linear(4, 3), torch.randn(1, 4), torch.randn(1, 4)
        >>> [cosine] = gradient_correlation(net, x, x + noise, [0.5], torch.sum)[0.5]
        >>> round(cosine, 4)  # the gradient of a linear net is the same everywhere
        1.0
    """
    check_steps(steps=steps)
    if x.dim() == 0 or x.numel() == 0 or towards.shape != x.shape:
        raise ValueError(
            f"x and towards must have one shape, (N, ...), that is not empty, got {tuple(x.shape)} and "
            f"{tuple(towards.shape)}"
        )
    if towards.is_complex() and not x.is_complex():
        raise ValueError(f"towards must be real where x is, got {towards.dtype} for x of {x.dtype}")
    own = _directions(input_gradient(net, x, loss))
    cosines = {}
    for step in steps:
        there = _directions(input_gradient(net, torch.lerp(x, towards.to(x), step), loss))
        cosines[step] = torch.linalg.vecdot(own, there).real.clamp(-1, 1).tolist()
    return cosines


def _directions(grad: Tensor) -> Tensor:
    """Of length 1, one row for each entry of the batch."""
    rows = wide(grad).reshape(len(grad), -1)
    rows = rows / rows.abs().amax(1, keepdim=True)  # whose squares do not leave the range of numbers
    directions: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return directions
