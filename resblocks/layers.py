"""What branches are made of: convolution, normalisation and what changes the resolution, in 1D, 2D and 3D."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import repeat
from math import gcd
from typing import Any, TypeAlias, cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from resblocks.checks import check_dims, check_positive
from resblocks.watched import is_watched

# einops looks at the tensor it is given, which torch.fx cannot trace: its calls stay whole in the graph.
torch.fx.wrap("rearrange")
torch.fx.wrap("reduce")

Layer = Callable[..., nn.Module]
Family = tuple[Layer, Layer, Layer]  # one layer each for 1D, 2D and 3D data
Classes = tuple[type[Any], type[Any], type[Any]]  # a family of classes, which isinstance takes too

convolution: Classes = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
batch_norm: Classes = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: Instance norm of torch for 1D, 2D and 3D (Ulyanov et al. 2016), a value for the option `norm`.
#:
#: :meta hide-value:
instance_norm: Classes = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
max_pool: Classes = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
avg_pool: Classes = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


Stride: TypeAlias = int | tuple[int, ...]  # the same in all dimensions, or one for each


def one_stride(stride: object, dims: int | None = None, name: str = "stride") -> Stride:
    """The stride as an integer where it is the same in all dimensions, else as a tuple with one for each.

    Raises:
        ValueError: no positive integer, nor so many of them as there are dimensions.
    """
    if not isinstance(stride, (tuple, list)):
        check_positive(**{name: stride})
        return cast(int, stride)
    if len(stride) != (len(stride) if dims is None else dims) or any(type(n) is not int or n < 1 for n in stride):
        where = "each dimension" if dims is None else f"each of the {dims} dimensions"
        raise ValueError(f"{name} must be a positive integer, or one for {where}, got {stride!r}")
    return stride[0] if len(set(stride)) == 1 else tuple(stride)


def times(one: Stride, other: Stride) -> Stride:
    """The stride of two layers, one behind the other."""
    if isinstance(one, int) and isinstance(other, int):
        return one * other
    each = (repeat(stride) if isinstance(stride, int) else stride for stride in (one, other))
    return one_stride([first * second for first, second in zip(*each, strict=False)])


def by_dims(layer: Layer) -> Family:
    """A layer with an argument `dims`, for 1D, 2D and 3D data."""
    return partial(layer, dims=1), partial(layer, dims=2), partial(layer, dims=3)


def named(**layers: nn.Module | None) -> nn.Sequential:
    """A sequence of named layers without those that are None: what a branch is written with, in the figure's order."""
    sequence = nn.Sequential()
    for name, layer in layers.items():
        if layer is not None:
            sequence.add_module(name, layer)
    return sequence


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(x: Tensor) -> torch.memory_format:
    """Memory format of x: channels_last if its channels lie closest together, in a slice of channels too."""
    return _LAST[x.dim()] if x.dim() in _LAST and x.stride(1) < x.stride(-1) else torch.contiguous_format


def over_positions(values: Tensor, x: Tensor) -> Tensor:
    """Values of channels, with a dimension of size 1 for each spatial one of x: (..., C) -> (..., C, 1, ...)."""
    return values[(...,) + (None,) * (x.dim() - 2)]


def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift, in the dtype of scale and shift."""
    if x.device.type == "cpu" and x.stride(-1) == 1:
        return (x * scale).add_(shift)  # addcmul is not vectorised there
    return torch.addcmul(shift, x, scale)


def running_affine(norm: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode, in the dtype given or that of its statistics."""
    dtype = norm.running_var.dtype if dtype is None else dtype
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.to(dtype)
    shift = -norm.running_mean.to(dtype) * scale
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias.to(dtype)).detach()


class GlobalAvgPool(nn.Module):
    """Mean of each channel over all positions. Shape: (N, C, ...) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = reduce(x, "n c ... -> n c", "mean")
        return pooled


# --- convolution


class WeightStandardised(nn.modules.conv._ConvNd):
    """Convolution whose filters have zero mean and unit variance (Qiao et al. 2019, eq. 11)."""

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps
        self.filter_dims = tuple(range(1, len(self.kernel_size) + 2))  # not asked of the weight, which torch.fx hides

    def standardised(self) -> Tensor:
        var, mean = torch.var_mean(self.weight, self.filter_dims, correction=0, keepdim=True)
        return (self.weight - mean) * torch.rsqrt(var + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(x, self.standardised(), self.bias)
        return out

    def extra_repr(self) -> str:
        torchs: Any = super()  # its method has no types
        return f"{torchs.extra_repr()}, eps={self.eps}"


class WSConv1d(WeightStandardised, nn.Conv1d):
    """Weight-standardised 1D convolution (Qiao et al. 2019, eq. 11).

    Args:
        args, kwargs: those of `nn.Conv1d`.
        eps: added to the variance of each filter.

    Shape: as `nn.Conv1d`.
    """


class WSConv2d(WeightStandardised, nn.Conv2d):
    """Weight-standardised 2D convolution (Qiao et al. 2019, eq. 11).

    Args:
        args, kwargs: those of `nn.Conv2d`.
        eps: added to the variance of each filter.

    Shape: as `nn.Conv2d`.
    """


class WSConv3d(WeightStandardised, nn.Conv3d):
    """Weight-standardised 3D convolution (Qiao et al. 2019, eq. 11).

    Args:
        args, kwargs: those of `nn.Conv3d`.
        eps: added to the variance of each filter.

    Shape: as `nn.Conv3d`.
    """


#: `WSConv1d`, `WSConv2d` and `WSConv3d`, the value for the option `conv` (Qiao et al. 2019).
#:
#: :meta hide-value:
weight_standardised: Classes = (WSConv1d, WSConv2d, WSConv3d)


# --- normalisation


def group_norm(channels: int, groups: int | None = None) -> nn.Module:
    """Group norm (Wu and He 2018) with gcd(groups, channels) groups, so that any channel count works.

    Args:
        channels: of the map.
        groups: None is 32, or half the channels where a group would else have one channel only: that is instance norm,
            which leaves nothing of a map of one position.

    Shape: of the layer: (N, channels, ...) -> same.

    Raises:
        ValueError: channels or groups are below 1.
    """
    check_positive(channels=channels, groups=32 if groups is None else groups)
    found = gcd(32 if groups is None else groups, channels)
    return nn.GroupNorm(max(1, found // 2) if groups is None and found == channels else found, channels)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels at each position (as in ConvNeXt, Liu et al. 2022).

    Args:
        normalized_shape: number of channels; the rest as of `nn.LayerNorm`.

    Shape: (N, C, ...) -> same.
    """

    repeatable = True  # for `resblocks.rebuild`

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = super().forward(rearrange(x, "n c ... -> n ... c"))
        out: Tensor = rearrange(last, "n ... c -> n c ...")
        return out


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine are buffers: it never changes, in `train()` either.

    Its state dict has the names of `nn.BatchNorm2d`.

    Args:
        channels: of the map.
        eps: added to the variance.

    Shape: (N, channels, ...) -> same.
    """

    repeatable = True  # for `resblocks.rebuild`
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the identity."""
        for buffer in (self.weight, self.running_var):
            nn.init.ones_(buffer)
        for buffer in (self.bias, self.running_mean, self.num_batches_tracked):
            nn.init.zeros_(buffer)

    @classmethod
    def from_norm(cls, norm: nn.modules.batchnorm._BatchNorm) -> FrozenBatchNorm:
        """The frozen norm with the values of a batch norm; without an affine that of an untrained one.

        Raises:
            ValueError: the norm does more than normalise, which would be lost: a forward of its own, or hooks; or it
                keeps no statistics.
        """
        if type(norm).forward not in FREEZABLE or is_watched(norm):
            raise ValueError(
                f"norm must be torch's and without hooks to be frozen, got {norm}, which does more than that"
            )
        if norm.running_mean is None:
            raise ValueError(f"norm must keep running statistics to be frozen, got {norm}")
        frozen = cls(norm.num_features, norm.eps)
        values = {name: getattr(norm, name) for name in frozen._buffers}
        reference = next((value for value in values.values() if value is not None), frozen.weight)
        frozen = frozen.to(device=reference.device, dtype=reference.dtype)
        for name, value in values.items():  # by attribute: a parametrization or pruning computes them
            if value is not None:
                frozen._buffers[name] = value.detach().clone()
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


FREEZABLE = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


def freeze_norm(net: nn.Module) -> nn.Module:
    """Replace every batch norm of the net by a `FrozenBatchNorm` of the same values, which `train()` does not wake.

    Weights and biases of the norms become buffers: make the optimizer afterwards. Norms that are frozen stay so.

    Raises:
        ValueError: the net has no batch norm, is one, or has one that does more than normalise or keeps no statistics.
    """
    if isinstance(net, nn.modules.batchnorm._BatchNorm):
        raise ValueError(f"net must hold the norms to freeze, got {net}: FrozenBatchNorm.from_norm freezes one alone")
    found = [
        (parent, name, FrozenBatchNorm.from_norm(child))
        for parent in net.modules()
        for name, child in parent._modules.items()  # named_children leaves repeated ones out
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]
    if not found and not any(isinstance(layer, FrozenBatchNorm) for layer in net.modules()):
        raise ValueError(f"net must have a batch norm to freeze, got {type(net).__name__} without any")
    for parent, name, frozen in found:
        setattr(parent, name, frozen)
    return net


# --- resolution


class BlurPool(nn.Module):
    """Binomial 1-2-1 filter, then every stride-th position (Zhang 2019, sec. 3.2).

    Args:
        channels, stride, dims: of the map.
        border: what lies beyond the map: "replicate", "reflect" (Zhang; it fails on maps of one position) or
            "constant", which is zero.
        dilation: distance between the positions that the filter reads; those that lie so far apart have borders of
            their own, as if they were a map.

    Shape: (N, channels, L, ...) -> (N, channels, ceil(L / stride), ...).
    """

    def __init__(
        self, channels: int, stride: Stride, dims: int = 2, border: str = "replicate", dilation: int = 1
    ) -> None:
        super().__init__()
        check_dims(dims)
        check_positive(channels=channels, dilation=dilation)
        if border not in ("replicate", "reflect", "constant"):
            raise ValueError(f"border must be replicate, reflect or constant, got {border!r}")
        self.channels, self.stride, self.dims, self.border = channels, one_stride(stride, dims), dims, border
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        # Made anew, on the device of x: a constant kept as a buffer is lost where a net comes from the meta device.
        line = nn.functional.pad(x.new_full((1,), 0.5), (1, 1), value=0.25)
        kernel = line
        for _ in range(self.dims - 1):
            kernel = kernel[..., None] * line
        weight = kernel.expand(self.channels, 1, *[3] * self.dims)
        if self.border != "constant" and (self.dilation > 1 or torch.compiler.is_compiling()):
            padded = pad_apart(x, self.dims, self.dilation, self.border)
        else:
            padded = nn.functional.pad(x, (self.dilation, self.dilation) * self.dims, mode=self.border)
        conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self.dims - 1]
        return conv(padded, weight, stride=self.stride, dilation=self.dilation, groups=self.channels)

    def extra_repr(self) -> str:
        dilation = f", dilation={self.dilation}" if self.dilation > 1 else ""
        return f"{self.channels}, stride={self.stride}, border={self.border}{dilation}"


@torch.fx.wrap
def pad_apart(x: Tensor, dims: int, dilation: int, border: str) -> Tensor:
    """One position more on each side of each map of positions `dilation` apart, by mode "replicate" or "reflect".

    At dilation 1 `pad` does the same, but inductor lays out its gradient in another way than it is (torch 2.14, 2D).
    """
    inside = dilation if border == "reflect" else 0  # how far from the border the copied positions begin
    for dim in range(x.dim() - dims, x.dim()):
        size = x.shape[dim]
        if size <= inside:
            raise ValueError(f"border must be replicate or constant on maps of one position, got {border!r}")
        count = min(dilation, size - inside)
        first, last = x.narrow(dim, inside, count), x.narrow(dim, size - inside - count, count)
        missing = x.new_zeros([*x.shape[:dim], dilation - count, *x.shape[dim + 1 :]])  # beyond maps that are not there
        x = torch.cat([first, missing, x, missing, last] if count < dilation else [first, x, last], dim)
    return x


@torch.fx.wrap
def small_avg_pool3d(x: Tensor, window: Stride) -> Tensor:
    """Average pool over windows that shrink to maps smaller than they are, as those of 1D and 2D do."""
    windows = (window,) * 3 if isinstance(window, int) else window
    size = list(map(min, windows, x.shape[2:]))
    return nn.functional.avg_pool3d(x, size, window, ceil_mode=True, count_include_pad=False)


class _AvgPool3d(nn.AvgPool3d):
    def forward(self, x: Tensor) -> Tensor:
        return small_avg_pool3d(x, cast(Stride, self.kernel_size))


class SpreadAverage(nn.Module):
    """Mean over a window of positions that lie apart and exist, at every position: an average pool without its stride.

    Args:
        window: positions along each dimension, the first of which is that of the output.
        dilation: distance between them.

    Shape: (N, channels, ...) -> same.
    """

    def __init__(self, window: int, dilation: int) -> None:
        super().__init__()
        check_positive(window=window, dilation=dilation)
        self.window, self.dilation = window, dilation

    def forward(self, x: Tensor) -> Tensor:
        return spread_mean(x, self.window, self.dilation)

    def extra_repr(self) -> str:
        return f"window={self.window}, dilation={self.dilation}"


@torch.fx.wrap
def spread_mean(x: Tensor, window: int, dilation: int) -> Tensor:
    """What `SpreadAverage` computes, one dimension after the other."""
    for dim in range(2, x.dim()):
        x = _spread_mean_along(x, dim, window, dilation)
    return x


def _spread_mean_along(x: Tensor, dim: int, window: int, dilation: int) -> Tensor:
    """Mean along one dimension over the positions that exist of a window that begins at each."""
    size = x.shape[dim]
    count = torch.arange(size, 0, -1, device=x.device).add(dilation - 1).div(dilation, rounding_mode="floor")
    total = x
    for step in range(dilation, min(window * dilation, size), dilation):
        beyond = [0, 0] * (x.dim() - 1 - dim) + [0, step]
        total = total + nn.functional.pad(x.narrow(dim, step, size - step), beyond)
    return total / count.clamp(max=window).to(x.dtype).view(-1, *[1] * (x.dim() - 1 - dim))


def at_every_position(pool: nn.Module, dilation: int) -> nn.Module:
    """What a pool with a stride puts out, but at every position, of positions `dilation` apart.

    It takes the pool's place where a dilation replaces the stride: at the positions of the pool it puts out the same.

    Raises:
        ValueError: a pool of another kind than `average_downsample` and `blur_downsample`.
    """
    if type(pool) is BlurPool:
        return BlurPool(pool.channels, 1, pool.dims, pool.border, dilation)
    if type(pool) in (*avg_pool, _AvgPool3d):
        window: Any = pool.stride
        return SpreadAverage(window if isinstance(window, int) else window[0], dilation)
    raise ValueError(
        f"downsample must be average_downsample or blur_downsample where a dilation replaces strides (output_stride), "
        f"got {pool}"
    )


def _average(pool: Layer, channels: int, stride: Stride) -> nn.Module:
    return pool(stride, stride, ceil_mode=True, count_include_pad=False)


#: Average pools for 1D, 2D and 3D, the value for the option `downsample` (He et al. 2019).
#:
#: :meta hide-value:
average_downsample: Family = (
    partial(_average, nn.AvgPool1d),
    partial(_average, nn.AvgPool2d),
    partial(_average, _AvgPool3d),
)
#: `BlurPool` for 1D, 2D and 3D, the value for the option `downsample` (Zhang 2019).
#:
#: :meta hide-value:
blur_downsample = by_dims(BlurPool)
