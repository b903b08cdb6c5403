"""Activation checkpointing that leaves the same net behind: statistics counted once, the same random masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from resblocks.layers import batch_norm, instance_norm
from resblocks.watched import is_recorded

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


class AsThen:
    """While it is entered, modules are what they were when it was made: weights, modes, switches, hooks.

    Backward comes later: a switch may be back, a mode another, a hook gone, and `torch.func.functional_call` has taken
    its weights away again. What the modules change in their buffers, they change in copies, so nothing is counted a
    second time. It serves as often as there are backward passes; those of several threads wait for each other.

    Args:
        modules: a block and all in it, or its parts.
        recorded: whether autograd records the second run, which then has to keep as many tensors as the first.
    """

    def __init__(self, modules: Iterable[nn.Module], *, recorded: bool) -> None:
        plain = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        self.then = [(module, _state(module)) for module in plain]
        self.now: list[tuple[nn.Module, dict[str, Any]]] = []
        self.recorded = recorded
        # Blocks may share parts. All who lock do it in one order, and so never wait for each other in a circle.
        self.locks = [_locks.setdefault(module, RLock()) for module in sorted(plain, key=id)]

    def __enter__(self) -> None:
        for lock in self.locks:
            lock.acquire()
        try:
            then = [(module, self.stand_in(module, state)) for module, state in self.then]
            self.now = [(module, module.__dict__) for module, _ in self.then]
            put(then)
        except BaseException:  # out of memory, Ctrl-C: nobody calls __exit__ then
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            put(self.now)
        except BaseException:  # Ctrl-C halfway
            put(self.now)
            raise
        finally:
            self.now = []
            for lock in self.locks:
                lock.release()

    def stand_in(self, module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """The module's attributes then, with statistics that it may write to."""
        buffers: dict[str, Tensor | None] = state["_buffers"]
        if not state.get("training", False):  # which a compiled part has from what it compiles
            return state.copy()
        if not writes_only(module):
            return {**state, "_buffers": _copied(buffers)}
        # Python finds them before the buffers, which a state dict that somebody takes meanwhile holds as they are.
        return {**state, **{name: self.scratch(buffer) for name, buffer in buffers.items() if name in STATISTICS}}

    def scratch(self, statistic: Tensor | None) -> Tensor | None:
        """Room for a mean or a variance, none for a count."""
        if statistic is None or not self.recorded or not statistic.is_floating_point():
            return None
        return torch.empty_like(statistic)


def put(states: Iterable[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Give modules other attributes."""
    for module, state in states:
        module.__dict__ = state


def writes_only(module: nn.Module) -> bool:
    """Whether the module does not read in training what it counts: torch's own norms take the batch's statistics."""
    return type(module) in (*batch_norm, *instance_norm)


def _state(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, its parameters, buffers, children and hooks each in a dictionary of their own."""
    state = {name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()}
    if module.training and not writes_only(module):
        state["_buffers"] = _copied(state["_buffers"])
    return state


def _copied(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}


def recompute(module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`run(x)`, whose activations are computed again in backward instead of being kept.

    Gradients, random masks and running statistics are those of the plain run: the second pass normalises by the
    statistics of the batch like the first, but counts them in no running mean (torch.utils.checkpoint alone updates
    them twice, pytorch issue 96136). The hooks that were on the parts in forward run in both passes. Function
    transforms, forward-mode differentiation, `make_fx` and `torch.jit.trace`, which checkpoints do not work under, run
    plainly.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return run(x)
    if torch.compiler.is_compiling():  # the compiler takes the updates of statistics out of what it computes twice
        out: Tensor = checkpoint(_Guarded(module, run), x, use_reentrant=False)
    elif is_recorded() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        out = run(x)
    else:
        # Torch would stop the second pass at the last tensor that is kept, which RReLU fills only later.
        stop = not any(isinstance(part, nn.RReLU) for part in module.modules())
        passes = nullcontext(), AsThen(module.modules(), recorded=True)
        with set_checkpoint_early_stop(stop):
            out = checkpoint(run, x, use_reentrant=False, context_fn=lambda: passes)
    return out


class _Guarded:
    """`run`, and where a graph break makes torch run a checkpoint that was to be compiled, the second pass as then."""

    def __init__(self, module: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        self.module, self.run = module, run
        self.then: AsThen | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.run(x)
        if self.then is None:
            self.then = AsThen(self.module.modules(), recorded=True)
            return self.run(x)
        with self.then:
            return self.run(x)
