"""What arguments must be: errors that name the argument, the rule and the value."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd


def check_positive(**arguments: object) -> None:
    """Raise unless every argument is an integer of at least 1."""
    check_integer(1, **arguments)


def check_integer(least: int, **arguments: object) -> None:
    """Raise unless every argument is an integer of at least `least`; bools do not count as integers."""
    for name, value in arguments.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_number(**arguments: object) -> None:
    """Raise unless every argument is an integer or a float of Python, or a kind of them; bools do not count."""
    for name, value in arguments.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{name} must be an integer or a float, got {value!r}")


def check_flag(**arguments: object) -> None:
    """Raise unless every argument is True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def check_dims(dims: object) -> None:
    """Raise unless there are layers for data of so many spatial dimensions."""
    if type(dims) is not int or dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, got {dims!r}")


def check_probability(**arguments: object) -> None:
    """Raise unless every argument is at least 0 and below 1."""
    for name, value in arguments.items():
        if not (isinstance(value, (int, float)) and 0 <= value < 1):
            raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")


def check_fraction(**arguments: object) -> None:
    """Raise unless every argument is above 0 and at most 1."""
    for name, value in arguments.items():
        if not (isinstance(value, (int, float)) and 0 < value <= 1):
            raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")


def check_dtype(dtype: object) -> None:
    """Raise unless weights can have it, or it is None."""
    if not (dtype is None or (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex))):
        raise ValueError(f"dtype must be a torch.dtype of floating point numbers or None, got {dtype!r}")


def check_sequence(**arguments: object) -> None:
    """Raise unless every argument holds several values, and is no string."""
    for name, value in arguments.items():
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{name} must be a list or another sequence, got {value!r}")


def check_steps(**arguments: object) -> None:
    """Raise unless every argument is a sequence of finite numbers."""
    for name, steps in arguments.items():
        check_sequence(**{name: steps})
        for step in cast(Sequence[object], steps):
            check_number(**{name: step})
            if not abs(cast(float, step)) <= sys.float_info.max:  # an integer may be larger than any float
                raise ValueError(f"{name} must be finite, got {step}")


def check_input_size(sizes: object) -> None:
    """Raise unless `sizes` is a sequence of positive integers, at least one."""
    fits = isinstance(sizes, Sequence) and bool(sizes) and all(isinstance(size, int) and size > 0 for size in sizes)
    if not fits:
        raise ValueError(f"input_size must be positive integers, one sample without the batch, got {sizes!r}")


@contextmanager
def explained(net: nn.Module, input_size: Sequence[int]) -> Iterator[None]:
    """Say of an error in the net's forward which input size it was given, and what the net reads first."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reads = next(
            (f"; its first convolution is {layer}" for layer in net.modules() if isinstance(layer, _ConvNd)), ""
        )
        raise ValueError(
            f"input_size must be one sample that the net takes, without the batch dimension, got {tuple(input_size)}"
            f"{reads} ({type(error).__name__}: {error})"
        ) from error
