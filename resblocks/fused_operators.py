"""Convolution, addition and ReLU in one operator, where torch has it: oneDNN on the CPU, cuDNN on CUDA.

None of these is part of torch's public interface, so each is tried before it is used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resblocks import winograd
from resblocks.layers import layout_of, over_positions, scaled
from resblocks.residual import fitting
from resblocks.watched import is_traced


class Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Source(NamedTuple):
    """What a weight was when it was packed: which tensor, where it lies, how often it was changed in place.

    The count is None for tensors of inference mode, of which torch keeps none.
    """

    weight: Tensor
    address: int
    version: int | None

    @classmethod
    def of(cls, weight: Tensor) -> Source:
        """The source that the weight is now."""
        return cls(weight, weight.data_ptr(), None if weight.is_inference() else weight._version)

    def is_still(self, weight: Tensor) -> bool:
        """Whether it is this weight, unchanged as far as torch counts changes."""
        return self.weight is weight and self[1:] == Source.of(weight)[1:]


class Packed(NamedTuple):
    """A weight as one shape of the input likes it best: oneDNN's layout of it, or what Winograd's algorithm reads.

    The weight is None where there is neither; `source` is what it was made of.
    """

    shape: tuple[int, ...]
    by_winograd: bool
    weight: Tensor | None
    source: Source | None


def runs_eagerly(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing traces and nothing is recorded, so that operators may run that only some backends know."""
    if is_traced(x):
        return False
    return not (torch.is_grad_enabled() and any(read is not None and read.requires_grad for read in (x, *others)))


@torch.fx.wrap
def conv_add_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    relu: bool,
    geometry: Geometry,
    packed: Packed | None = None,
    over: bool = False,
) -> Tensor:
    """`relu(conv(x) + other)` in one operator where torch has it; `other` and the ReLU may be left out.

    With `over` the result may take the place of `other`. Autocast does not know these operators: under it the plain
    ones run.
    """
    eager = x.device.type in ("cpu", "cuda") and runs_eagerly(x, weight, bias, other)
    alike = weight.dim() == x.dim() == 4 and x.dtype == weight.dtype
    if not (eager and alike) or torch.is_autocast_enabled(x.device.type):
        return plain_conv_add_relu(x, weight, bias, other, relu, geometry)
    if x.device.type == "cpu" and has_onednn(x.dtype):
        if packed is not None and packed.weight is not None and packed.shape == x.shape:
            if packed.by_winograd:
                return _winograd(x, packed.weight, bias, other, relu)
            weight = packed.weight
        if over and other is not None and may_write(other, x, weight, geometry):
            return _onednn_over(x, weight, bias, other, relu, geometry)
        return _onednn(x, weight, bias, other, relu, geometry)
    if x.is_cuda and relu and has_cudnn(x.dtype):
        return _cudnn(x, weight, bias, other, geometry)
    return plain_conv_add_relu(x, weight, bias, other, relu, geometry)


@torch.fx.wrap
def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`scale * x + shift` of each channel."""
    return scaled(x, over_positions(scale, x), over_positions(shift, x))


@torch.fx.wrap
def affine_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`relu(scale * x + shift)` of each channel.

    Where the plain operators are slow, in bfloat16 on large maps in channels_last, it is one convolution by oneDNN.
    """
    large = x.device.type == "cpu" and x.dim() == 4 and x.numel() >= LARGE and is_channels_last(x)
    narrow = x.dtype == scale.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
    if large and narrow and runs_eagerly(x) and has_onednn(x.dtype):
        geometry = Geometry([1, 1], [0, 0], [1, 1], len(scale))
        return _onednn(x, scale.view(-1, 1, 1, 1), shift, None, True, geometry)
    return affine(x, scale, shift).relu_()


LARGE = 2**17  # numbers; the call of a convolution takes longer than those of the plain operators


def plain_conv_add_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool, geometry: Geometry
) -> Tensor:
    """The same by the operators that every backend has."""
    conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[weight.dim() - 3]
    return _joined(conv(x, weight, bias, *geometry), other, relu)


def _joined(y: Tensor, other: Tensor | None, relu: bool) -> Tensor:
    """`relu(y + other)` of a y that nobody else has seen."""
    if other is not None:
        y = other + fitting(y, other)
    return torch.relu_(y) if relu else y


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool, geometry: Geometry
) -> Tensor:
    operator: Any = torch.ops.mkldnn._convolution_pointwise
    stride, padding, dilation, groups = geometry
    moves = (padding, stride, dilation, groups)
    if other is None:
        y: Tensor = operator(x, weight, bias, *moves, "relu" if relu else "none", [], "")
        return y
    if math.prod(other.shape[2:]) == 1 or not adds(x, weight):  # torch 2.11 fails on one position
        return _joined(operator(x, weight, bias, *moves, "none", [], ""), other, relu)
    return fitting(operator.binary(x, other, weight, bias, *moves, "add", 1.0, "relu" if relu else None, [], ""), other)


def adds(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's convolution takes an addition in; where it does not, torch fails in bfloat16 (2.11 to 2.14)."""
    return weight.is_mkldnn or any(map(is_channels_last, (x, weight)))


def is_channels_last(x: Tensor) -> bool:
    """Whether x is laid out so and in no other way, as torch decides it where a size is 1."""
    return layout_of(x) is torch.channels_last and x.is_contiguous(memory_format=torch.channels_last)


def _onednn_over(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, relu: bool, geometry: Geometry
) -> Tensor:
    stride, padding, dilation, groups = geometry
    operator: Any = torch.ops.mkldnn._convolution_pointwise_.binary
    moves = (padding, stride, dilation, groups)
    y: Tensor = operator(other, x, weight, bias, *moves, "add", 1.0, "relu" if relu else None, [], "")
    return y


def may_write(other: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether oneDNN can put the convolution's output where `other` is: what it reads must lie elsewhere."""
    if x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr():
        return False
    stride, padding, dilation, _ = geometry
    moves = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    positions = [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in moves]
    last = is_channels_last(other) and is_channels_last(x)
    fits = list(other.shape) == [len(x), len(weight), *positions] and other.dtype == x.dtype
    return fits and last and math.prod(positions) > 1 and can_write_over(x.dtype)


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool) -> Tensor:
    if other is None:
        return winograd.convolve(x, weight, bias, relu)
    y = winograd.convolve(x, weight, bias)
    y = y.add_(fitting(other, y))
    return y.relu_() if relu else y


def _cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, geometry: Geometry) -> Tensor:
    if other is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *geometry)


def packed_weight(weight: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor | None:
    """The weight in the layout that oneDNN likes best for inputs of this shape, or None where there is none."""
    fits = weight.device.type == "cpu" and weight.dim() == len(shape) == 4
    return _reordered(weight, shape, geometry) if fits and has_layouts(weight.dtype) else None


def _reordered(weight: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight.detach(), padding, stride, dilation, groups, list(shape)
    )
    return packed


TRIAL_SECONDS = 0.1  # of both ways together: five turns of half a millisecond are a matter of chance
SAME = Geometry([1, 1], [1, 1], [1, 1], 1)


def fits_winograd(weight: Tensor, shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether Winograd's algorithm can be used, and has channels and tiles enough to be worth a trial."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.shape[2:] != (3, 3) or geometry != SAME:
        return False
    tiles = shape[0] * math.prod(-(-length // winograd.TILE) for length in shape[2:])
    return min(weight.shape[:2]) >= 64 and tiles >= 32 and has_layouts(weight.dtype)


@cache
@torch.no_grad()
def winograd_is_faster(shape: tuple[int, ...], out_channels: int, threads: int) -> bool:
    """Whether it is, by a tenth at least, at its best of many; `threads` is what the answer depends on besides."""
    ones = partial(torch.ones, dtype=torch.float32, device="cpu")
    x = ones(shape).contiguous(memory_format=torch.channels_last)
    weight = ones(out_channels, shape[1], 3, 3)
    ways = (
        partial(_onednn, x, _reordered(weight, shape, SAME), None, None, False, SAME),
        partial(winograd.convolve, x, winograd.transform_weight(weight), None),
    )
    rounds = max(5, int(TRIAL_SECONDS / sum(map(_seconds, ways))))
    direct, quick = zip(*[[_seconds(way) for way in ways] for _ in range(rounds)], strict=True)
    return bool(min(quick) < 0.9 * min(direct))


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch's fused oneDNN operator runs here and is right."""
    return _is_right(torch.device("cpu"), dtype, _onednn)


@cache
def can_write_over(dtype: torch.dtype) -> bool:
    """Whether torch's fused operator that writes over what it adds runs here and is right."""
    return _is_right(
        torch.device("cpu"),
        dtype,
        lambda x, weight, bias, other, *rest: _onednn_over(x, weight, bias, other.clone(), *rest),
    )


@cache
def has_layouts(dtype: torch.dtype) -> bool:
    """Whether oneDNN's own layouts of a weight can be had here and give right results."""
    return has_onednn(dtype) and _is_right(
        torch.device("cpu"), dtype, lambda x, weight, *rest: _onednn(x, _reordered(weight, x.shape, POINTWISE), *rest)
    )


@cache
def has_cudnn(dtype: torch.dtype) -> bool:
    """Whether torch's fused cuDNN operators run here and are right."""
    return _is_right(
        torch.device("cuda"), dtype, lambda x, weight, bias, other, _, moves: _cudnn(x, weight, bias, other, moves)
    )


POINTWISE = Geometry([1, 1], [0, 0], [1, 1], 1)


@torch.no_grad()
def _is_right(device: torch.device, dtype: torch.dtype, operator: Callable[..., Tensor]) -> bool:
    """Whether the operator runs, and gives what the plain ones give on numbers that have no rounding.

    Asked as nets ask: in channels_last, of channels in a multiple of eight.
    """
    try:
        x = torch.ones(1, 16, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.full((16, 16, 1, 1), -0.03125, device=device, dtype=dtype)
        bias = torch.arange(16, device=device).to(dtype) / 4 - 2  # so that some sums are negative
        given = (x, weight, bias, x.clone(), True, POINTWISE)
        return bool(torch.equal(operator(*given), plain_conv_add_relu(*given)))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
