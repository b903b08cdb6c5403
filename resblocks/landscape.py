"""The loss around a net, on lines and planes (Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from resblocks.checks import check_integer, check_sequence, check_steps
from resblocks.measures import wide
from resblocks.undisturbed import restored, unwrapped

Direction: TypeAlias = Mapping[str, Tensor]
Evaluate: TypeAlias = Callable[[nn.Module], float]
NORMS = (nn.LayerNorm, nn.RMSNorm)  # whose weights may have the shape of a map


def random_direction(net: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A direction drawn at random in which each filter is as long as the net's own (Li et al. 2018, section 4).

    Norms and rectifiers make a net indifferent to the scale of its filters, so a step of one length is long for a net
    with small weights and short for one with large ones; in lengths of the filters nets can be compared. A filter is
    what one output channel reads (in a transposed convolution, what one input channel is spread by). Norms stay where
    they are, as in the paper, and with them all parameters with one value for each entry of the first dimension: biases
    and scales. Of a weight that is computed, by a parametrization or pruning, the parameters move that it is made of.

    Args:
        net: any module; the names are those of the net inside `torch.compile` and data-parallel wrappers.
        seed: of the draw; the same direction on every device.

    Raises:
        ValueError: the net has no filters, or has lazy ones; a seed below 0.
    """
    check_integer(0, seed=seed)
    generator, direction = torch.Generator().manual_seed(seed), {}
    for name, weight in _filters(unwrapped(net)).items():
        own = wide(weight).cpu()
        drawn = torch.randn(own.shape, generator=generator, dtype=own.dtype)
        drawn *= (_norms(own) / _norms(drawn)).view(-1, *[1] * (own.dim() - 1))
        direction[name] = drawn.to(weight.device, weight.dtype)
    if not direction:
        raise ValueError(f"net must have weights with filters, got {type(net).__name__} without any")
    return direction


def loss_line(
    net: nn.Module, evaluate: Evaluate, steps: Sequence[float], direction: Direction | None = None
) -> dict[float, float]:
    """Measure the net along a line through its weights.

    Args:
        evaluate: returns the metric, as a rule the loss, of the net that it is given, which is in eval mode, with
            gradients off. Batch norms keep their running statistics; where they should fit the moved weights, let
            `evaluate` train them on some batches.
        steps: how far along the direction; 0 is the net as it is.
        direction: what a step of 1 adds, by name of parameter or buffer, as `random_direction` names them, such as the
            way to another net; None is `random_direction(net)`.

    Returns:
        The metric at each step.

    Raises:
        ValueError: steps that are no finite numbers, a direction that does not fit the net; what `random_direction`
            raises.
    """
    directions = [random_direction(net) if direction is None else direction]
    return {step: metric for (step,), metric in _metrics(net, evaluate, steps, directions).items()}


def loss_surface(
    net: nn.Module,
    evaluate: Evaluate,
    steps: Sequence[float],
    directions: tuple[Direction, Direction] | None = None,
) -> dict[tuple[float, float], float]:
    """Measure the net on a grid in a plane through its weights (Li et al. 2018, figures 1 and 5).

    One plane of many: a bump that it shows is there, one that it does not show may be elsewhere.

    Args:
        steps: how far along each of the two directions: n steps are n * n evaluations.
        directions: two, as in `loss_line`; None is `random_direction(net, seed)` with the seeds 0 and 1.
        evaluate: as in `loss_line`.

    Returns:
        The metric at each point (step along the first direction, step along the second).

    Raises:
        ValueError: not two directions; what `loss_line` raises.
    """
    if directions is None:
        directions = (random_direction(net, 0), random_direction(net, 1))
    check_sequence(directions=directions)
    if len(directions) != 2:
        raise ValueError(f"directions must be two, got {len(directions)}")
    return {(one, other): metric for (one, other), metric in _metrics(net, evaluate, steps, directions).items()}


def _filters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The weights with several values a channel, but for those of norms."""
    norms = {id(weight) for layer in net.modules() if isinstance(layer, NORMS) for weight in layer.parameters()}
    found = {}
    for name, weight in net.named_parameters():
        if is_lazy(weight):
            raise ValueError(f"net must know the shapes of its weights, got {name} without one: let it run once")
        if weight.dim() > 1 and weight.numel() > len(weight) > 0 and id(weight) not in norms:
            found[name] = weight
    return found


def _norms(weight: Tensor) -> Tensor:
    """The length of each filter."""
    norms: Tensor = weight.flatten(1).norm(dim=1)
    return norms


def _metrics(
    net: nn.Module, evaluate: Evaluate, steps: Sequence[float], directions: Sequence[Direction]
) -> dict[tuple[float, ...], float]:
    """Of the net at each point of the grid."""
    check_steps(steps=steps)
    ways = [_ways(unwrapped(net), direction) for direction in directions]
    return {point: _metric(net, evaluate, point, ways) for point in product(steps, repeat=len(ways))}


def _ways(net: nn.Module, direction: Any) -> list[tuple[Tensor, Tensor]]:
    """The tensors of the net that move and where to, each once, however many names it has."""
    if not isinstance(direction, Mapping) or not direction:
        raise ValueError(f"direction must map names to tensors, at least one, got {direction!r:.80}")
    parameters = net.named_parameters(remove_duplicate=False)
    tensors: dict[str, Tensor] = {**dict(parameters), **dict(net.named_buffers(remove_duplicate=False))}
    ways = {}
    for name, way in direction.items():
        if name not in tensors:
            raise ValueError(f"direction must name parameters or buffers of the net, got {name!r}")
        tensor = tensors[name]
        moves = tensor.is_floating_point() or tensor.is_complex()
        if not (moves and isinstance(way, Tensor) and way.shape == tensor.shape):
            got = tuple(way.shape) if isinstance(way, Tensor) else repr(way)
            raise ValueError(
                f"direction must move floating point numbers by a tensor of their shape: {name} is {tensor.dtype} "
                f"{tuple(tensor.shape)}, got {got}"
            )
        ways[id(tensor)] = (tensor, way.detach().to(tensor, copy=True))  # which may be the tensor itself
    return list(ways.values())


def _metric(
    net: nn.Module, evaluate: Evaluate, point: Sequence[float], ways: Sequence[Sequence[tuple[Tensor, Tensor]]]
) -> float:
    """Of the net at one point; whatever `evaluate` does to it, the next one begins from the same net."""
    with restored(net), torch.no_grad():
        for step, way in zip(point, ways, strict=True):
            for tensor, end in way:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.add_(end, alpha=step)
        return float(evaluate(net.eval()))
