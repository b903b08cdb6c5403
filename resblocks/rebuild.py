"""Activations that are not kept for backward, but rebuilt from what their norm read: `checkpoint="norms"`.

A convolution behind a norm and an activation keeps its input for backward, and the norm keeps its own: two maps for
one convolution. The first is a function of the second that costs no convolution, so it is computed again when backward
comes to it, by the same operators from the same values: bit by bit what it was. Statistics are counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from resblocks.layers import batch_norm, instance_norm
from resblocks.recompute import AsThen
from resblocks.watched import is_watched

NORMS = (*batch_norm, *instance_norm, nn.GroupNorm, nn.LayerNorm)
# One operator each, which draws nothing.
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus, nn.Tanh, nn.Sigmoid),
)
KEEP_RESULT = (nn.ReLU, nn.Tanh, nn.Sigmoid)  # for backward; the others keep what they read

_Packed: TypeAlias = "tuple[Any, Any]"  # a pair and which of its values, or a tensor and its version


def can_rebuild(norm: nn.Module, act: nn.Module) -> bool:
    """Whether norm and activation are of kinds whose result can be computed a second time without a trace.

    Those are torch's, and norms with an attribute `repeatable = True`: the same output each time, and nothing changed.
    """
    return is_repeatable(norm) and type(act) in ACTIVATIONS


def is_repeatable(norm: nn.Module) -> bool:
    """Whether the layer is such a norm."""
    return type(norm) in NORMS or getattr(norm, "repeatable", False)


def may_rebuild(norm: nn.Module, act: nn.Module) -> bool:
    """Whether moreover nobody looks on: a hook would be called twice."""
    return can_rebuild(norm, act) and not is_watched(norm) and not is_watched(act)


def has_pair(*parts: nn.Module) -> bool:
    """Whether a part is a sequence with a norm and an activation behind it that can be rebuilt."""
    return any(
        can_rebuild(norm, act)
        for part in parts
        if type(part) is nn.Sequential
        for norm, act in zip(list(part), list(part)[1:], strict=False)
    )


class Rebuild:
    """Runs the layers of a block so that no operator keeps what a norm and an activation put out.

    Raises:
        RuntimeError: in backward, when a tensor that it needs was changed in place since forward.
    """

    def __init__(self) -> None:
        # By storage, which operators share with the aliases of a tensor that they keep.
        self._made: WeakKeyDictionary[Any, tuple[_Pair, bool, object, int]] = WeakKeyDictionary()
        self._running: _Pair | None = None

    def activate(self, norm: nn.Module, act: nn.Module, x: Tensor, normed: Tensor) -> Tensor:
        """`act(normed)`, where normed is `norm(x)`."""
        pair = _Pair(norm, act, x)
        self._register(pair, normed, pair.in_place)
        self._running = pair
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                out: Tensor = torch.relu_(normed) if pair.in_place else act(normed)
        finally:
            self._running = None
        self._register(pair, out, True)
        return out

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`layer(x)`, whose operators keep none of the values that `activate` has put out."""
        if not self._made:
            out: Tensor = layer(x)
            return out
        with saved_tensors_hooks(self._pack, _unpack):
            out = layer(x)
        return out

    def _register(self, pair: _Pair, value: Tensor, activated: bool) -> None:
        self._made[value.untyped_storage()] = pair, activated, _layout(value), value._version

    def _pack(self, tensor: Tensor) -> _Packed:
        if tensor.layout is not torch.strided:  # sparse ones have no storage
            return tensor.detach(), tensor._version
        found = self._made.get(tensor.untyped_storage())
        if found is not None:
            pair, activated, layout, version = found
            # A later version is another value, unless the activation itself is at work in place.
            if _layout(tensor) == layout and (pair is self._running or tensor._version == version):
                return pair, pair.expect(activated)
        elif self._running is not None and type(self._running.act) in KEEP_RESULT:
            return self._running, self._running.expect(True)  # the operator keeps its result before it puts it out
        return tensor.detach(), tensor._version  # without its node, which would keep itself alive


def start_rebuild() -> Rebuild | None:
    """A new `Rebuild`; None within somebody else's hooks of saved tensors, for instance those of a checkpoint.

    Only the innermost hooks see a tensor, and what they would hand on is what others keep less of.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    ours = hooks is None or isinstance(getattr(hooks[0], "__self__", None), Rebuild)
    return Rebuild() if ours else None


class _Pair:
    """A norm and an activation that ran on x, to run again."""

    def __init__(self, norm: nn.Module, act: nn.Module, x: Tensor) -> None:
        self.norm, self.act, self.x = norm, act, x.detach()
        # Torch's norms put out a new tensor and do not keep it; anyone's may do both.
        self.in_place = type(act) is nn.ReLU and type(norm) in NORMS
        self.as_then = AsThen((norm, act), recorded=False)
        buffers = [] if _by_batch(norm) else list(norm.buffers())
        read = [self.x, *norm.parameters(), *act.parameters(), *buffers]
        self.read = [(tensor, tensor._version) for tensor in read]
        self.autocast = _autocast(x.device.type)
        self.expected: list[bool] = []  # which value each operator will ask for: normed (False) or activated (True)
        self.asked = 0
        self.values: dict[bool, Tensor] = {}

    def expect(self, activated: bool) -> bool:
        self.expected.append(activated)
        return activated

    def value(self, activated: bool) -> Tensor:
        """One of the values; both are dropped when all who keep them have asked."""
        if activated not in self.values:
            self.values = self.run()
        value = self.values[activated]
        self.asked += 1
        if self.asked % len(self.expected) == 0:
            self.values = {}
        return value

    def run(self) -> dict[bool, Tensor]:
        for tensor, version in self.read:
            _check_version(tensor, version)
        norm: Any = self.norm
        act: Any = self.act
        with torch.no_grad(), self.autocast(), self.as_then:
            normed = type(norm).forward(norm, self.x)
            if False not in self.expected and self.in_place:
                return {True: torch.relu_(normed)}
            return {False: normed, True: type(act).forward(act, normed)}


def _unpack(packed: _Packed) -> Tensor:
    kept, which = packed
    if isinstance(kept, _Pair):
        return kept.value(which)
    tensor: Tensor = kept
    _check_version(tensor, which)
    return tensor


def _check_version(tensor: Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that backward needs was changed in place after forward: "
            f"it is at version {tensor._version}, expected version {version}"
        )


def _layout(tensor: Tensor) -> object:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


def _autocast(kind: str) -> Callable[[], AbstractContextManager[object]]:
    """What enters once more the autocast of now."""
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def _by_batch(norm: Any) -> bool:
    """Whether a norm reads the statistics of the batch, not the running ones."""
    return bool(norm.training) or getattr(norm, "running_mean", None) is None
