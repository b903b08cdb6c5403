"""Whether net and data go together, seen on a batch before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from resblocks.undisturbed import restored

from .data import Dataset
from .device import is_out_of_memory
from .loop import Loop


def check_trainable(net: nn.Module) -> None:
    """Raise unless a net is finished, finite, has weights to train, and a state that weights can be saved of."""
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"net must know its shapes before training, got a lazy {name}: call it on an image once")
    for name, weight in net.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"net must have memory for weights, got {name} on the meta device: net.to_empty(...) first"
            )
        if not weight.isfinite().all():
            raise ValueError(f"net must start from finite weights, got infinite or NaN values in {name}")
    if not any(weight.requires_grad for weight in net.parameters()):
        raise ValueError("net must have a parameter to train, got none with requires_grad=True")
    for name, value in net.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"net must have a state dict of tensors alone, got {type(value).__name__} under {name!r}")


def check_net(loop: Loop, dataset: Dataset) -> None:
    """Let the net see an image in evaluation and a batch in training; net and random numbers are left as they were.

    Raises:
        ValueError: it does not take the images, or does not put out one logit for each class, or none that a weight
            to train has a part in.
    """
    gpus = [loop.device] if loop.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), torch.no_grad(), restored(loop.net), loop.autocast():
        loop.net.eval()
        check_logits(
            loop, loop.normalised(loop.images[:1]), len(dataset.classes), f"of shape {dataset.shape} (C, H, W)"
        )
        loop.net.train()
        batch = loop.normalised(loop.images[: loop.local_batch], loop.recipe.scale_at(0, loop.total_steps))
        settings = f"start_scale={loop.recipe.start_scale}, {loop.local_batch} images a process and step"
        said = f"of shape {tuple(batch.shape[1:])} in training ({settings})"
        with torch.enable_grad():
            logits = check_logits(loop, batch, len(dataset.classes), said)
        if not logits.requires_grad:
            raise ValueError("net must have a parameter to train that its logits depend on, got none that they do")


def check_logits(loop: Loop, images: Tensor, classes: int, said: str) -> Tensor:
    """The net's logits of such images; raise unless there is one for each class."""
    try:
        logits: Tensor = loop.net(images)
    except (RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"net must take images {said}, it says: {error}") from error
    expected = len(images), classes
    if getattr(logits, "shape", None) != expected:
        got = tuple(logits.shape) if hasattr(logits, "shape") else type(logits).__name__
        raise ValueError(f"net must put out a logit for each class, {expected} for images {said}, got {got}")
    return logits
