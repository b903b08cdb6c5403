"""A residual net as many paths (Veit et al. 2016, "Residual networks behave like ensembles").

What it loses with some of its blocks damaged, and how much gradient flows through single paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations, permutations
from math import comb
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from resblocks.checks import check_integer, check_positive, check_sequence
from resblocks.measures import norm_of
from resblocks.residual import Residual, Where, skips_off, some_residuals
from resblocks.undisturbed import eager, hooked, input_gradient, restored

Part: TypeAlias = Literal["branch", "skip", "block"]
Evaluate: TypeAlias = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Lesion:
    """The metric of a net with one block damaged; `change` is the metric minus that of the intact net."""

    name: str
    metric: float
    change: float


@dataclass(frozen=True)
class LesionStudy:
    """What `lesion_study` returns: the metric of the intact net, and a lesion for each block."""

    intact: float
    lesions: tuple[Lesion, ...]


def lesion_study(
    net: nn.Module, evaluate: Evaluate, *, part: Part = "branch", where: Where | None = None
) -> LesionStudy:
    """Damage one block at a time and measure the net (Veit et al. 2016, section 4.1).

    Blocks that have nothing to lose of the kind are left out: for "branch" and "skip" those whose skip is off, for
    "block" those that change the shape of their input.

    Args:
        evaluate: returns the metric of the net that it is given, which is in eval mode, with gradients off.
        part: "branch" puts zeros in the branch's place, which leaves the shortcut, as in the paper (after a `Concat`,
            zeros instead of features; after `Gated` and `WeightedAdd`, the shortcut with its weight); "skip" switches
            the shortcut off; "block" hands the block's input on in place of its output, with skips or without, as the
            paper takes layers out of a VGG net (one evaluation more, which finds the blocks).
        where: which blocks, as in `resblocks.set_skip`; None takes every block.

    Raises:
        ValueError: `part` is none of these, no block is left to damage, or a skip cannot be switched.
    """
    blocks = _candidates(net, evaluate, part, where)
    intact = _metric(net, evaluate, [], part)
    metrics = [_metric(net, evaluate, [block], part) for block in blocks.values()]
    lesions = zip(blocks, metrics, strict=True)
    return LesionStudy(intact, tuple(Lesion(name, metric, metric - intact) for name, metric in lesions))


def lesion_curve(
    net: nn.Module,
    evaluate: Evaluate,
    counts: Sequence[int] | None = None,
    *,
    trials: int = 10,
    seed: int = 0,
    part: Part = "branch",
    where: Where | None = None,
) -> dict[int, list[float]]:
    """Damage several blocks at once, drawn at random, and measure the net (Veit et al. 2016, section 4.2, fig. 5a).

    Args:
        counts: how many blocks at once; None is 0, 1, 2, ... up to all of them.
        trials: different choices of blocks for each count; all of them where there are no more than trials.
        seed: of the draws; the same one draws the same blocks, whatever the other counts.
        evaluate, part, where: as in `lesion_study`.

    Returns:
        The metrics of the trials for each count.

    Raises:
        ValueError: a count above the number of blocks, trials below 1; what `lesion_study` raises.
    """
    blocks = list(_candidates(net, evaluate, part, where).values())
    counts = range(len(blocks) + 1) if counts is None else counts
    _check_draws(len(blocks), trials, seed, counts=counts)
    return {
        count: [
            _metric(net, evaluate, [blocks[index] for index in chosen], part)
            for chosen in _draws(len(blocks), count, trials, seed)
        ]
        for count in counts
    }


def path_gradients(
    net: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor],
    lengths: Sequence[int] | None = None,
    *,
    trials: int = 10,
    seed: int = 0,
    where: Where | None = None,
) -> dict[int, list[float]]:
    """The gradient that reaches the input through one path at a time (Veit et al. 2016, section 5, fig. 6b).

    A net of n blocks has one path for each choice of blocks: through their branches, and through the shortcuts of the
    others. Forward is that of the whole net; backward follows one path. The net runs in the mode that it is in.

    Args:
        x: a batch of floating point numbers.
        loss: maps the net's output to a scalar, by operations that autograd records.
        lengths: through how many branches; None is 0, 1, 2, ... up to all of them.
        trials: different paths for each length; all of them where there are no more than trials.
        seed: of the draws; the same one draws the same paths, whatever the other lengths.
        where: the blocks to choose among, as in `resblocks.set_skip`; gradients pass both ways through the others.

    Returns:
        The Euclidean norms of the gradient at x, a path each, for each length.

    Raises:
        ValueError: a length above the number of blocks, trials below 1; x of integers; the loss is no scalar, or cut
            off from the net's output; no block has a skip that is on; a block inside another one; one that does not run
            once, with a merge of its own.
    """
    blocks = _with_skip(net, where)
    lengths = range(len(blocks) + 1) if lengths is None else lengths
    _check_draws(len(blocks), trials, seed, lengths=lengths)
    for (outer, block), (inner, other) in permutations(blocks.items(), 2):
        if other in block.modules():
            raise ValueError(f"where must choose no block inside another, got {inner!r} inside {outer!r}")
    return {
        length: [_path_gradient(net, x, loss, blocks, path) for path in _draws(len(blocks), length, trials, seed)]
        for length in lengths
    }


def _path_gradient(
    net: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], blocks: dict[str, Residual], path: Sequence[int]
) -> float:
    gates = [_Gate(side=1 if index in path else 0) for index in range(len(blocks))]
    hooks = (block.merge.register_forward_pre_hook(gate) for block, gate in zip(blocks.values(), gates, strict=True))

    def loss_of_one_path(y: Tensor) -> Tensor:
        for name, gate in zip(blocks, gates, strict=True):
            if gate.runs != 1:
                raise ValueError(
                    f"where must choose blocks that run once, with a merge of their own; that of {name or 'the net'} "
                    f"ran {gate.runs} times"
                )
        return loss(y)

    return norm_of(input_gradient(net, x, loss_of_one_path, hooks))


class _Gate:
    """Before a merge: lets the gradient through on one side, 0 for the shortcut and 1 for the branch."""

    def __init__(self, side: int) -> None:
        self.side, self.runs = side, 0

    def __call__(self, merge: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.runs += 1
        return tuple(arg if at == self.side else arg.detach() for at, arg in enumerate(args))


def _check_draws(blocks: int, trials: int, seed: int, **arguments: Sequence[int]) -> None:
    check_sequence(**arguments)
    check_positive(trials=trials)
    check_integer(0, seed=seed)
    for name, counts in arguments.items():
        if any(type(count) is not int or not 0 <= count <= blocks for count in counts):
            raise ValueError(f"{name} must be integers from 0 to {blocks}, the number of blocks, got {counts}")


def _draws(blocks: int, count: int, trials: int, seed: int) -> list[tuple[int, ...]]:
    """Different choices of so many blocks: all of them where there are no more than trials, else random ones."""
    if comb(blocks, count) <= trials:
        return list(combinations(range(blocks), count))
    generator = torch.Generator().manual_seed(seed)
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < trials:
        drawn.add(tuple(sorted(torch.randperm(blocks, generator=generator)[:count].tolist())))
    return sorted(drawn)


def _candidates(net: nn.Module, evaluate: Evaluate, part: Part, where: Where | None) -> dict[str, Residual]:
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(get_args(Part))}, got {part!r}")
    return _that_keep_shape(net, evaluate, where) if part == "block" else _with_skip(net, where)


def _that_keep_shape(net: nn.Module, evaluate: Evaluate, where: Where | None) -> dict[str, Residual]:
    blocks, keeps = some_residuals(net, where), dict[nn.Module, bool]()

    def look(block: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        keeps[block] = keeps.get(block, True) and y.shape == args[0].shape

    with hooked(block.register_forward_hook(look) for block in blocks.values()):
        _metric(net, evaluate, [], "block")
    blocks = {name: block for name, block in blocks.items() if keeps.get(block)}
    if not blocks:
        raise ValueError("net must have at least one block that keeps the shape of its input, got none")
    return blocks


def _with_skip(net: nn.Module, where: Where | None) -> dict[str, Residual]:
    blocks = {name: block for name, block in some_residuals(net, where).items() if block.skip}
    if not blocks:
        raise ValueError("net must have at least one block whose skip is on, got none")
    return blocks


def _metric(net: nn.Module, evaluate: Evaluate, damaged: Sequence[Residual], part: Part) -> float:
    """Of the net with these blocks damaged; whatever `evaluate` does to it, the next one begins from the same net."""
    with restored(net), eager(), torch.no_grad(), _damage(net, damaged, part):
        return float(evaluate(net.eval()))


def _damage(net: nn.Module, blocks: Sequence[Residual], part: Part) -> AbstractContextManager[object]:
    if part == "skip" and blocks:
        return skips_off(net, where=lambda name, block: block in blocks)
    if part == "block":
        return hooked(block.register_forward_hook(_input) for block in blocks)
    return hooked(block.branch.register_forward_hook(_zeros) for block in blocks)


def _zeros(module: nn.Module, args: object, y: Tensor) -> Tensor:
    return torch.zeros_like(y)


def _input(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return args[0]
