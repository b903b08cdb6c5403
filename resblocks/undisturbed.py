"""Looking at a net and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


@contextmanager
def hooked(handles: Sequence[RemovableHandle] | Iterator[RemovableHandle]) -> Iterator[None]:
    """Keep hooks for a while; all of them are removed on every way out, an error while registering included."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def eager() -> AbstractContextManager[None]:
    """Run compiled nets without their graphs, which know nothing of hooks that came later."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def unwrapped(net: nn.Module) -> nn.Module:
    """The net inside the wrappers of `torch.compile`, of data-parallel training and of weight averaging."""
    while isinstance(net, WRAPPERS) or "_orig_mod" in net._modules:
        net = cast(nn.Module, net._modules["_orig_mod" if "_orig_mod" in net._modules else "module"])
    return net


@contextmanager
def modes_restored(net: nn.Module) -> Iterator[None]:
    """Put back on leaving every module's training flag and what hooks compute as attributes."""
    training = {module: module.training for module in net.modules()}
    computed = [
        (module, name, value)
        for module in training
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for module, name, value in computed:
            setattr(module, name, value)


@contextmanager
def restored(net: nn.Module) -> Iterator[None]:
    """The same, and every buffer's value; a backward that began before does not notice."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in net.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    versioned = tuple(buffer for _, _, buffer, _ in buffers if not buffer.is_inference())
    with torch.autograd._unsafe_preserve_version_counter(versioned), modes_restored(net):  # the values come back
        try:
            yield
        finally:
            for module, name, buffer, value in buffers:
                with torch.no_grad(), torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(value)
                setattr(module, name, buffer)


@contextmanager
def weights_restored(net: nn.Module) -> Iterator[None]:
    """Put back on leaving what a forward in training has made of the weights: some follow their inputs."""
    before = [(weight, weight.detach().clone()) for weight in net.parameters()]
    try:
        yield
    finally:
        for weight, value in before:
            weight.detach().copy_(value)
