"""Whether net and data go together, seen on one image before anything is written."""

from __future__ import annotations

import torch

from .augment import normalise
from .data import Dataset
from .loop import Loop


def check_net(loop: Loop, dataset: Dataset) -> None:
    """Let the net see one image, in evaluation mode; net and random numbers are left as they were.

    Raises:
        ValueError: it does not take the images, or does not put out one logit for each class.
    """
    was_training = {module: module.training for module in loop.net.modules()}
    gpus = [loop.device] if loop.device.type == "cuda" else []
    images = normalise(loop.images[:1], loop.mean, loop.std).contiguous(memory_format=loop.memory_format)
    try:
        with torch.random.fork_rng(gpus), torch.no_grad(), loop.autocast():
            logits = loop.net.eval()(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"net must take images of shape {dataset.shape} (C, H, W), it says: {error}") from error
    finally:
        for module, mode in was_training.items():
            module.training = mode
    expected = 1, len(dataset.classes)
    if getattr(logits, "shape", None) != expected:
        got = tuple(logits.shape) if hasattr(logits, "shape") else type(logits).__name__
        raise ValueError(f"net must put out a logit for each class, {expected} for one image, got {got}")
