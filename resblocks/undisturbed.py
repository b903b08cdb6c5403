"""Looking at a net and leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from resblocks.measures import scalar

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Keep hooks for a while; all of them are removed on every way out, an error while registering included."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def eager() -> AbstractContextManager[None]:
    """Run compiled nets without their graphs, which know nothing of hooks that came later."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def undisturbed(net: nn.Module, x: Tensor) -> Iterator[None]:
    """Run a net on x by way of its modules and leave values, modes and random state as they were."""
    cuda = [x.device] if x.device.type == "cuda" else []
    with restored(net), eager(), torch.random.fork_rng(devices=cuda):
        yield


def input_gradient(
    net: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], hooks: Iterable[RemovableHandle] = ()
) -> Tensor:
    """The gradient of a loss at x, with hooks that are there for this run alone.

    Raises:
        ValueError: x of integers, a loss that is no scalar or cut off from the net's output.
    """
    if not (x.is_floating_point() or x.is_complex()):
        raise ValueError(f"x must be of floating point numbers, got {x.dtype}")
    with undisturbed(net, x), torch.inference_mode(False), torch.enable_grad(), hooked(hooks):
        start = x.detach().clone().requires_grad_()
        value = scalar(loss(net(start.clone())))  # a net that begins in place may write over the copy of the leaf
        if not value.requires_grad:
            raise ValueError("loss must depend on the net's output by operations that autograd records")
        (grad,) = torch.autograd.grad(value, start, allow_unused=True, materialize_grads=True)
    return grad


def unwrapped(net: nn.Module) -> nn.Module:
    """The net inside the wrappers of `torch.compile`, of data-parallel training and of weight averaging."""
    while isinstance(net, WRAPPERS) or "_orig_mod" in net._modules:
        net = cast(nn.Module, net._modules["_orig_mod" if "_orig_mod" in net._modules else "module"])
    return net


@contextmanager
def attributes_restored(net: nn.Module) -> Iterator[None]:
    """Put back on leaving what modules hold besides parameters and children: modes, counters, caches, which buffers."""
    training = {module: module.training for module in net.modules()}
    before = [(module, type(module), _attributes(module)) for module in training]
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, kind, attributes in before:
            if type(module) is kind:  # a lazy module is another one after its first forward
                _put_back(module, attributes)


# What every module has for its own work.
INTERNAL = vars(nn.Module()).keys()


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The attributes of a module, lists and dictionaries with a copy of what is in them."""
    return {
        name: (value, value.copy() if type(value) in (dict, list) else None)
        for name, value in vars(module).items()
        if name not in INTERNAL or name == "_buffers"
    }


def _put_back(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    now = vars(module)
    for name in now.keys() - attributes.keys() - INTERNAL:
        del now[name]
    for name, (value, content) in attributes.items():
        now[name] = value
        if content is not None:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)


@contextmanager
def restored(net: nn.Module) -> Iterator[None]:
    """`attributes_restored`, and the values of parameters and buffers; a backward that began before does not notice."""
    tensors = [tensor for tensor in (*net.parameters(), *net.buffers()) if not is_lazy(tensor)]
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    versioned = tuple(tensor for tensor in tensors if not tensor.is_inference())
    with _unsafe_preserve_version_counter(versioned), attributes_restored(net):  # the values come back
        try:
            yield
        finally:
            for tensor, value in before:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(value)
