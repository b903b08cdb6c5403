"""What a fused net is made of: convolutions that add and rectify, dense layers that clamp; see `resblocks.fuse`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resblocks import winograd
from resblocks.layers import _WeightStandardised as WeightStandardised
from resblocks.layers import layout_of, over_positions
from resblocks.residual import fitting
from resblocks.watched import is_traced, is_watched


class Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Packed(NamedTuple):
    """A weight as one shape of the input likes it best: oneDNN's layout of it, or what Winograd's algorithm reads.

    The weight is None where there is neither; `source` is what it was made of, and the version of that.
    """

    shape: tuple[int, ...]
    by_winograd: bool
    weight: Tensor | None
    source: tuple[Tensor, int | None] | None


class Frozen(nn.Module):
    """A module that is for evaluation only."""

    def train(self, mode: bool = True) -> Frozen:
        """Evaluation only.

        Raises:
            RuntimeError: mode is True: the norm that would train is gone.
        """
        if mode:
            raise RuntimeError(
                "a fused net cannot train: its norms are folded into its convolutions; train the net itself"
            )
        return super().train(mode)


class FusedConv(Frozen):
    """A convolution with the norm behind it in its weights, which may also add a map and apply a ReLU.

    Its state dict holds weight and bias alone. A prepacked weight is made of them anew after `load_state_dict`, `to`,
    a copy and a pickle.

    Shape: as the convolution's; `other`, which is added before the ReLU, has the shape of the output, and may be
        written over on request.
    """

    packed: Packed | None = None

    def __init__(self, conv: _ConvNd, norm: nn.Module | None = None) -> None:
        super().__init__()
        weight, bias = folded(conv, norm)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        padding = [int(padding) for padding in conv.padding]
        self.geometry = Geometry(list(conv.stride), padding, list(conv.dilation), conv.groups)
        self.relu = False

    def forward(self, x: Tensor, other: Tensor | None = None, over: bool = False) -> Tensor:
        packed = self.packed if runs_eagerly(x) and self.is_packed() else None  # nothing that traces knows the layout
        return conv_add_relu(x, self.weight, self.bias, other, self.relu, self.geometry, packed, over)

    def pack(self, shape: Sequence[int], by_winograd: bool | None = None) -> None:
        """Lay the weight out for inputs of this shape, the batch included; None measures which way is faster."""
        fits = fits_winograd(self.weight, shape, self.geometry)
        if by_winograd is None and fits:
            by_winograd = winograd_is_faster(tuple(shape), len(self.weight), torch.get_num_threads())
        quick, source = bool(by_winograd and fits), (self.weight, version_of(self.weight))
        laid = winograd.transform_weight(self.weight) if quick else packed_weight(self.weight, shape, self.geometry)
        self.packed = Packed(tuple(shape), quick, laid, source)

    def is_packed(self) -> bool:
        """Whether the weight is still what was packed."""
        source = self.packed.source if self.packed else None
        return source is not None and source[0] is self.weight and source[1] == version_of(self.weight)

    def rectified(self) -> FusedConv:
        """The same convolution, weights shared, with a ReLU."""
        twin = copy.copy(self)
        twin._parameters = dict(self._parameters)
        twin.relu = True
        return twin

    def take_in(self, scale: Tensor, shift: Tensor) -> None:
        """Read z where `scale * z + shift` was read; the convolution must not pad."""
        weight = self.weight.detach()
        bias = torch.einsum("oi...,i->o", weight, shift) + (0 if self.bias is None else self.bias)
        self.weight = nn.Parameter(weight * over_positions(scale, weight), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def _repack(self) -> None:
        if self.packed is not None:
            self.pack(self.packed.shape, self.packed.by_winograd)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedConv:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._repack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._repack()

    def __getstate__(self) -> dict[str, Any]:
        # The layout belongs to this machine's oneDNN, and torch can neither copy nor save it.
        return {**self.__dict__, "packed": self.packed and self.packed._replace(weight=None, source=None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._repack()

    def extra_repr(self) -> str:
        out, into, *kernel = self.weight.shape
        said = f"{into * self.geometry.groups}, {out}, kernel_size={tuple(kernel)}"
        said += f", stride={tuple(self.geometry.stride)}, relu={self.relu}"
        if self.packed is not None:
            said += f", packed for {self.packed.shape}" + (" by Winograd" if self.packed.by_winograd else "")
        return said


class FusedResidual(nn.Module):
    """A residual block whose last convolution adds the shortcut and applies the activation.

    Shape: that of the block.
    """

    def __init__(self, preact: nn.Module, branch: nn.Sequential, last: FusedConv, shortcut: nn.Module) -> None:
        super().__init__()
        self.preact, self.branch, self.last, self.shortcut = preact, branch, last, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, owned=False)

    def run(self, x: Tensor, owned: bool) -> Tensor:
        """The block; it may write over an input that is `owned`."""
        h = self.preact(x)
        y = self.branch(h)
        shortcut = self.shortcut(h)
        free = runs_eagerly(x) and (ends_in_conv(self.shortcut) or (owned and shortcut is x))
        out: Tensor = self.last(y, shortcut, free and is_large(shortcut) and is_unseen(self))
        return out


class FusedStage(nn.Sequential):
    """Blocks in a row, each of which may write over what the one before it put out.

    A new tensor for each sum would be memory that the system hands out page by page: on a CPU a tenth of the time of a
    ResNet-50 at batch 1.

    Shape: that of the blocks.
    """

    def forward(self, x: Tensor) -> Tensor:
        owned, eager = False, runs_eagerly(x)
        for block in self:
            if eager and type(block) is FusedResidual and not is_watched(block):
                x, owned = block.run(x, owned), not is_watched(block.last)
            else:
                out: Tensor = block(x)
                x, owned = out, False
        return x


def ends_in_conv(shortcut: nn.Module) -> bool:
    """Whether the shortcut puts out a new tensor, that of a convolution."""
    return type(shortcut) is nn.Sequential and len(shortcut) > 0 and type(shortcut[-1]) is FusedConv


def is_large(x: Tensor) -> bool:
    """Whether a new tensor of that size on the CPU is memory from the system, not what the process freed before."""
    return x.device.type == "cpu" and x.numel() * x.element_size() >= 2**18


def is_unseen(block: nn.Module) -> bool:
    """Whether nobody could tell that a block writes over what its parts have read; a stranger may keep it."""
    return all(type(part).__module__.startswith(KNOWN) and not is_watched(part) for part in block.modules())


KNOWN = ("torch.nn.modules.", "resblocks.")


class FusedDenseBlock(nn.Sequential):
    """Dense layers that write their maps side by side in one buffer, the output of the block.

    Shape: that of the block.
    """

    def __init__(self, layers: dict[str, nn.Sequential], growths: Sequence[int]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.growths = list(growths)

    def forward(self, x: Tensor) -> Tensor:
        if not runs_eagerly(x):
            for layer in self:
                x = torch.cat([x, layer(x)], 1)
            return x
        stop, memory_format = x.shape[1], layout_of(x)
        shape = (x.shape[0], stop + sum(self.growths), *x.shape[2:])
        maps = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
        maps[:, :stop] = x
        for layer, growth in zip(self, self.growths, strict=True):
            read = maps[:, :stop]
            if not isinstance(next(layer.children()), Clamp):  # which reads the slice as it lies
                read = read.contiguous(memory_format=memory_format)
            maps[:, stop : stop + growth] = layer(read)
            stop += growth
        return maps


class Clamp(Frozen):
    """Half of a norm and a ReLU before a convolution, whose other half is in the weights.

    For scale > 0 it is `relu(scale * x + shift) = scale * max(x, t) + shift` with `t = -shift / scale`, for scale < 0
    a minimum, and for scale = 0 a constant. The affine that is left is linear, and the convolution takes it in: what
    took passes over the maps takes one.

    Shape: (N, channels, ...) -> same.
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, dims: int) -> None:
        super().__init__()
        edge = torch.where(scale == 0, 0.0, -shift / scale)
        shape = (1, -1, *[1] * dims)
        self.register_buffer("lower", edge.where(scale >= 0, -math.inf).view(shape))
        self.register_buffer("upper", edge.where(scale <= 0, math.inf).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.lower, self.upper)

    def extra_repr(self) -> str:
        return str(self.lower.numel())


class Affine(Frozen):
    """A norm that no convolution takes in, as scale and shift of each channel.

    Not a batch norm in evaluation mode, because quantisers fold one into the convolution before it, also where a
    shortcut or a concatenation reads that convolution, too (torchao 0.18, `prepare_pt2e`).

    Shape: (N, channels, ...) -> same.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        for name, value in zip(("scale", "shift"), affine(norm), strict=True):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return (x.movedim(1, -1) * self.scale).add_(self.shift).movedim(-1, 1)

    def extra_repr(self) -> str:
        return str(self.scale.numel())


def folded(conv: _ConvNd, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution with the norm behind it in evaluation mode."""
    weight = conv.standardised() if isinstance(conv, WeightStandardised) else conv.weight
    if norm is None:
        return weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone()
    scale, shift = affine(norm)
    shift = shift if conv.bias is None else shift + conv.bias * scale
    return (weight * over_positions(scale[:, None], weight)).detach(), shift.detach()


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in evaluation mode."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias).detach()


# --- one operator where torch has it; none of these is part of torch's public interface, so each is tried before use


def version_of(x: Tensor) -> int | None:
    """How often it was changed in place; None where torch does not count."""
    return None if x.is_inference() else x._version


def runs_eagerly(x: Tensor) -> bool:
    """Whether nothing traces and nothing is recorded, so that operators may run that only some backends know."""
    return not is_traced(x) and not (torch.is_grad_enabled() and x.requires_grad)


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

    With `over` the result may take the place of `other`.
    """
    if weight.dim() != 4 or x.dim() != 4 or x.dtype != weight.dtype or not runs_eagerly(x):
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
    if math.prod(other.shape[2:]) == 1:  # the operator of torch 2.11 fails there
        return _joined(operator(x, weight, bias, *moves, "none", [], ""), other, relu)
    return fitting(operator.binary(x, other, weight, bias, *moves, "add", 1.0, "relu" if relu else None, [], ""), other)


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
    last = other.is_contiguous(memory_format=torch.channels_last) and x.is_contiguous(memory_format=torch.channels_last)
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
    """Whether it is, by a tenth at least, in the best of five; `threads` is what the answer depends on besides."""
    ones = partial(torch.ones, dtype=torch.float32, device="cpu")
    x = ones(shape).contiguous(memory_format=torch.channels_last)
    weight = ones(out_channels, shape[1], 3, 3)
    ways = (
        partial(_onednn, x, _reordered(weight, shape, SAME), None, None, False, SAME),
        partial(winograd.convolve, x, winograd.transform_weight(weight), None),
    )
    direct, quick = zip(*[[_seconds(way) for way in ways] for _ in range(5)], strict=True)
    return bool(min(quick) < 0.9 * min(direct))


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch's fused oneDNN operator runs here and is right."""
    return _is_right(torch.device("cpu"), dtype, lambda x, weight, *rest: _onednn(x, weight, *rest))


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
    """Whether the operator runs, and gives on small integers, which have no rounding, what the plain ones give."""
    try:
        x, other = (torch.ones(1, 2, 3, 3, device=device, dtype=dtype) for _ in range(2))
        weight = torch.full((2, 2, 1, 1), -0.25, device=device, dtype=dtype)
        given = (x, weight, torch.zeros(2, device=device, dtype=dtype), other, True, POINTWISE)
        return bool(torch.equal(operator(*given), plain_conv_add_relu(*given)))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
