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

    In a deep net without skips they soon have nothing in common, as in white noise, however close the inputs; with
    skips they stay alike for longer. The paper measures scalar inputs; here it is the cosine of the angle between the
    whole gradients, those of the loss with respect to the input. The net runs in the mode that it is in: one that was
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
        ValueError: x of integers, or without a batch dimension; `towards` of another shape; steps that are no finite
            numbers; a loss that is no scalar, or cut off from the net's output.

    Example:
        >>> net, x, noise = nn.Linear(4, 3), torch.randn(1, 4), torch.randn(1, 4)
        >>> [cosine] = gradient_correlation(net, x, x + noise, [0.5], torch.sum)[0.5]
        >>> round(cosine, 4)  # the gradient of a linear net is the same everywhere
        1.0
    """
    check_steps(steps=steps)
    if x.dim() == 0 or towards.shape != x.shape:
        raise ValueError(
            f"towards must have the shape of x, (N, ...), got {tuple(towards.shape)} for x of {tuple(x.shape)}"
        )
    own = _directions(input_gradient(net, x, loss))
    cosines = {}
    for step in steps:
        there = _directions(input_gradient(net, torch.lerp(x, towards.to(x), step), loss))
        cosines[step] = torch.linalg.vecdot(own, there).real.tolist()
    return cosines


def _directions(grad: Tensor) -> Tensor:
    """Of length 1, one row for each entry of the batch."""
    rows = wide(grad).reshape(len(grad), -1)
    directions: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return directions
