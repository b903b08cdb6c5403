"""Count the bytes that a computation holds, operator by operator: exact, repeatable, and on the meta device free.

A tensor counts from the operator that makes it until its storage is freed; what operators use inside themselves does
not (work space of convolutions). What existed before does not either: parameters, buffers, the input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as count: ...`: what lives is in `count.now`, the most that ever lived in `count.peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in inputs:
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, nbytes: int) -> None:
        self.now -= nbytes


def peak_of_step(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes that one forward keeps for its backward, and the peak of both together."""
    with LiveBytes() as count:
        loss = forward()
        saved = count.now
        loss.backward()
    return saved, count.peak


def check_the_counter(device: str) -> None:
    """Raise unless the counter finds the sizes of a chain that can be counted by hand."""
    x = torch.zeros(1024, 256, device=device, requires_grad=True)  # 1 MiB
    with LiveBytes() as count:
        y = x.exp()  # kept: exp needs its result
        z = (y + 1).view(-1)  # kept while it has a name; a view adds nothing
        assert (count.now, count.peak) == (2 << 20, 2 << 20), (count.now, count.peak)
        del z
        assert count.now == 1 << 20, count.now
        y.backward(y.detach())  # the gradient of x joins
        assert (count.now, count.peak) == (2 << 20, 2 << 20), (count.now, count.peak)
        del y
        assert count.now == 1 << 20, count.now
        x.grad = None
    assert count.now == 0, count.now
