"""Activation checkpointing that leaves the same net behind: statistics counted once, the same random masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`run(x)`, whose activations are computed again in backward instead of being kept.

    Gradients, random masks and running statistics are those of the plain run: the second pass normalises by the
    statistics of the batch like the first, but counts them in no running mean (torch.utils.checkpoint alone updates
    them twice, pytorch issue 96136). Function transforms, which checkpoints do not work under, run plainly.
    """
    if torch._C._are_functorch_transforms_active():
        return run(x)
    if torch.compiler.is_compiling():  # the compiler takes the updates of statistics out of what it computes twice
        out: Tensor = checkpoint(run, x, use_reentrant=False)
    else:
        out = checkpoint(run, x, use_reentrant=False, context_fn=partial(_contexts, module))
    return out


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(module)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    # Without momentum and without a count, torch's norms still normalise by the batch but move their means by nothing.
    norms = [child for child in module.modules() if isinstance(child, _NormBase)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = None
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked = count
