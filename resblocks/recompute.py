"""Activation checkpointing that leaves the same net behind: statistics counted once, the same random masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from resblocks.watched import is_recorded

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class AsThen:
    """While it is entered, modules are what they were when it was made: weights, modes, switches.

    Backward comes later: a switch may be back, a mode another, and `torch.func.functional_call` has taken its weights
    away again. What the modules change in their buffers, they change in copies, so nothing is counted a second time.
    It serves as often as there are backward passes.

    Args:
        recorded: whether autograd records the second run, which then has to keep as many tensors as the first; else
            norms of the batch need no statistics at all.
    """

    def __init__(self, modules: Iterable[nn.Module], *, recorded: bool) -> None:
        plain = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        self.then = [(module, _state(module, recorded)) for module in plain]
        self.now: list[tuple[nn.Module, dict[str, Any]]] = []

    def __enter__(self) -> None:
        self.now = [(module, module.__dict__) for module, _ in self.then]
        for module, state in self.then:
            buffers = _copied(state["_buffers"]) if state["training"] else state["_buffers"]
            module.__dict__ = {**state, "_buffers": buffers}

    def __exit__(self, *error: object) -> None:
        for module, state in self.now:
            module.__dict__ = state
        self.now = []


def _state(module: nn.Module, recorded: bool) -> dict[str, Any]:
    buffers: dict[str, Tensor | None] = dict(module._buffers)
    if module.training and type(module) not in (*BATCH_NORMS, *INSTANCE_NORMS):
        buffers = _copied(buffers)
    elif module.training and not recorded:  # torch's own norms write to their statistics then, and do not read them
        buffers = dict.fromkeys(buffers)
    return {**module.__dict__, "_parameters": dict(module._parameters), "_buffers": buffers}


def _copied(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}


def recompute(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`run(x)`, whose activations are computed again in backward instead of being kept.

    Gradients, random masks and running statistics are those of the plain run: the second pass normalises by the
    statistics of the batch like the first, but counts them in no running mean (torch.utils.checkpoint alone updates
    them twice, pytorch issue 96136). Hooks on the parts run in both passes. Function transforms and `make_fx`, which
    checkpoints do not work under, run plainly.
    """
    if torch._C._are_functorch_transforms_active():
        return run(x)
    if torch.compiler.is_compiling():  # the compiler takes the updates of statistics out of what it computes twice
        out: Tensor = checkpoint(run, x, use_reentrant=False)
    elif is_recorded():
        out = run(x)
    else:
        # Torch would stop the second pass at the last tensor that is kept, which RReLU fills only later.
        stop = not any(isinstance(part, nn.RReLU) for part in module.modules())
        with set_checkpoint_early_stop(stop):
            out = checkpoint(run, x, use_reentrant=False, context_fn=partial(_contexts, module))
    return out


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), AsThen(module.modules(), recorded=True)
