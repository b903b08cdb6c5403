"""Whether anybody could tell that a module is not called, or that its output is written over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def is_traced(x: object) -> bool:
    """Whether a compiler, a tracer, a function transform or a hook of all modules looks on, or x is no plain tensor."""
    # is_compiling comes first: torch.compile and torch.export then trace nothing of this.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    if is_recorded() or is_kept():
        return True
    # Function transforms and forward-mode differentiation need operators that they know.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return bool(_has_any_global_hook()) or not is_plain(x)  # type: ignore[no-untyped-call]


def is_recorded() -> bool:
    """Whether `make_fx` writes operators down; it knows neither checkpoints nor autograd functions of our own."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_kept() -> bool:
    """Whether torch's selective checkpoint keeps what operators put out, which may then not be written over."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        isinstance(mode, SELECTIVE) for mode in _get_current_dispatch_mode_stack()
    )


SELECTIVE = tuple(
    getattr(torch.utils.checkpoint, name)
    for name in ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
    if hasattr(torch.utils.checkpoint, name)
)


def is_plain(x: object) -> TypeGuard[Tensor]:
    """Whether x is a tensor and nothing more; subclasses are distributed, fake, a tracer's ..."""
    return type(x) in (Tensor, nn.Parameter)


def is_watched(module: nn.Module) -> bool:
    """Whether the module itself, children aside, has a hook, a forward of its own, or is compiled."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    return "forward" in own or own.get("_compiled_call_impl") is not None  # by its method compile()


def may_replace(modules: Iterable[nn.Module], x: object) -> bool:
    """Whether nobody could tell that the modules and their children are not called on x."""
    return not is_traced(x) and not any(is_watched(child) for module in modules for child in module.modules())
