"""What branches are made of: convolution, normalisation, attention, drop path, scales and pooling, in 1D, 2D and 3D."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd, log2
from typing import Any, cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from resblocks.checks import check_dims, check_positive, check_probability
from resblocks.init import branch_weights
from resblocks.recompute import BATCH_NORMS, INSTANCE_NORMS
from resblocks.residual import fitting
from resblocks.watched import is_watched

# einops looks at the tensor it is given, which torch.fx cannot trace: its calls stay whole in the graph.
torch.fx.wrap("rearrange")
torch.fx.wrap("reduce")
torch.fx.wrap("fitting")  # known by the module whose forward calls it

Layer = Callable[..., nn.Module]
Family = tuple[Layer, Layer, Layer]  # one layer each for 1D, 2D and 3D data

convolution: Family = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
batch_norm: Family = BATCH_NORMS
instance_norm: Family = INSTANCE_NORMS
max_pool: Family = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
avg_pool: Family = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


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
    """channels_last where the channels of maps, or of some of a buffer's maps, lie innermost; else contiguous."""
    return _LAST[x.dim()] if x.dim() in _LAST and x.stride(1) < x.stride(-1) else torch.contiguous_format


def over_positions(values: Tensor, x: Tensor) -> Tensor:
    """Values of channels, with a dimension of size 1 for each spatial one of x: (..., C) -> (..., C, 1, ...)."""
    return values[(...,) + (None,) * (x.dim() - 2)]


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
    """Weight-standardised 1D convolution; `eps` is added to the variance, the rest is `nn.Conv1d`'s."""


class WSConv2d(WeightStandardised, nn.Conv2d):
    """Weight-standardised 2D convolution; `eps` is added to the variance, the rest is `nn.Conv2d`'s."""


class WSConv3d(WeightStandardised, nn.Conv3d):
    """Weight-standardised 3D convolution; `eps` is added to the variance, the rest is `nn.Conv3d`'s."""


weight_standardised: Family = (WSConv1d, WSConv2d, WSConv3d)


# --- normalisation


def group_norm(channels: int, groups: int | None = None) -> nn.Module:
    """Group norm (Wu and He 2018) with gcd(groups, channels) groups, so that any channel count works.

    Args:
        groups: None is 32, or half the channels where a group would else have one channel only: that is instance norm,
            which leaves nothing of a map of one position.
    """
    check_positive(channels=channels, groups=32 if groups is None else groups)
    found = gcd(32 if groups is None else groups, channels)
    return nn.GroupNorm(max(1, found // 2) if groups is None and found == channels else found, channels)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels at each position (as in ConvNeXt, Liu et al. 2022). Shape: (N, C, ...) -> same."""

    repeatable = True  # for `resblocks.rebuild`

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = super().forward(rearrange(x, "n c ... -> n ... c"))
        out: Tensor = rearrange(last, "n ... c -> n c ...")
        return out


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine are buffers: it never changes, in `train()` either.

    Its state dict has the names of `nn.BatchNorm2d`.

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

    Weights and biases of the norms become buffers: make the optimizer afterwards.

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
    if not found:
        raise ValueError(f"net must have a batch norm to freeze, got {type(net).__name__} without any")
    for parent, name, frozen in found:
        setattr(parent, name, frozen)
    return net


# --- attention


class SE(nn.Module):
    """Squeeze and excitation (Hu et al. 2018, fig. 2): a gate for each channel from the mean of all channels.

    Args:
        channels: of the input.
        reduction: channels over the width of the hidden layer, at least 8 of which are kept.

    Shape: (N, channels, ...) -> same.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        check_positive(channels=channels, reduction=reduction)
        hidden = max(channels // reduction, min(8, channels))
        self.reduce = nn.Linear(channels, hidden)
        self.act = nn.ReLU()
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(reduce(x, "n c ... -> n c", "mean")))
        return x * over_positions(gate, x)

    def excite(self, pooled: Tensor) -> Tensor:
        """The gate before its sigmoid. Shape: (N, channels) -> same."""
        gate: Tensor = self.expand(self.act(self.reduce(pooled)))
        return gate


class ECA(nn.Module):
    """Efficient channel attention (Wang et al. 2020, fig. 2): a 1D convolution over the channel means.

    The kernel size grows with the channels as the paper's eq. 12 says (gamma 2, b 1).

    Shape: (N, channels, ...) -> same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_positive(channels=channels)
        size = int(abs(log2(channels) + 1) / 2)
        size += 1 - size % 2
        # A layer of its own kind: the mix of channels is not one of the block's convolutions, which `conv` may replace.
        self.weight = nn.Parameter(torch.empty(1, 1, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernel as `nn.Conv1d` does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        means = reduce(x, "n c ... -> n 1 c", "mean")
        gate = torch.sigmoid(nn.functional.conv1d(means, self.weight, padding=self.weight.shape[-1] // 2))
        return x * over_positions(rearrange(gate, "n 1 c -> n c"), x)


class CBAM(SE):
    """Convolutional block attention (Woo et al. 2018, fig. 2): SE that reads the maxima, too, and a gate for positions.

    Args:
        channels: of the input.
        dims: number of spatial dimensions.
        reduction: channels over the width of the hidden layer, at least 8 of which are kept.
        kernel_size: of the convolution that makes the positions' gate.

    Shape: (N, channels, ...) -> same.
    """

    def __init__(self, channels: int, dims: int = 2, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__(channels, reduction)
        check_dims(dims)
        check_positive(kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep the size of the map, got {kernel_size}")
        self.spatial = convolution[dims - 1](2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean, largest = (reduce(x, "n c ... -> n c", how) for how in ("mean", "max"))
        gate = torch.sigmoid(self.excite(mean) + self.excite(largest))
        x = x * over_positions(gate, x)
        maps = torch.cat([reduce(x, "n c ... -> n 1 ...", how) for how in ("max", "mean")], 1)
        return x * torch.sigmoid(self.spatial(maps))


cbam = by_dims(CBAM)


# --- how the branch joins


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, sec. 3): in training drops the whole branch of a sample.

    A sample's branch is set to zero with probability `p`; the branches that stay are divided by 1 - p, so that the
    mean is that of evaluation, where nothing is dropped or scaled. (The paper scales in evaluation instead.)

    Args:
        p: probability of dropping, at least 0 and below 1.

    Shape: (N, ...) -> same.

    Raises:
        ValueError: p outside its range.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        check_probability(p=p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(x.shape[:1] + (1,) * (x.dim() - 1)).bernoulli_(1 - self.p)  # of x, so that vmap knows it
        return x * (keep / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ZeroInit(nn.Identity):
    """The branch as it is, but its last norm starts at zero, so that the block starts as its shortcut.

    From Goyal et al. 2017, sec. 5.1. In a pre-activation branch, or one without norm weights, it is the last
    convolution: a norm at zero before an activation would pass no gradient.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()

    def start_branch(self, branch: nn.Module) -> None:
        """Set the last weight to zero."""
        nn.init.zeros_(branch_weights(branch, ("conv", "norm"))[-1])


class LayerScale(nn.Module):
    """A factor for each channel, small at the start (Touvron et al. 2021, eq. 4). Shape: (N, channels, ...) -> same.

    Args:
        channels: of the branch.
        initial: factor at the start.
    """

    def __init__(self, channels: int, initial: float = 1e-5) -> None:
        super().__init__()
        self.initial = initial
        self.weight = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to `initial`."""
        nn.init.constant_(self.weight, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        return x * over_positions(self.weight, x)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, initial={self.initial}"


class SkipInit(nn.Module):
    """One factor for the whole branch, zero at the start (De and Smith 2020, sec. 4).

    Its weight has the shape (1,), since FSDP shards no scalars.

    Shape: (N, ...) -> same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the shortcut alone."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class ReZero(SkipInit):
    """One factor for the whole branch, zero at the start (Bachlechner et al. 2021, eq. 1); SkipInit by another name."""


class Fixup(nn.Module):
    """One factor for the branch and a start that trains without norm (Zhang et al. 2019, "Fixup", sec. 3).

    The last convolution of the branch starts at zero, and the other convolutions are drawn smaller by
    num_blocks ** (-1 / (2 m - 2)) for m convolutions. `ResNet` sets num_blocks and starts its head at zero. Use it
    with `norm=None`: the biases of the convolutions, one a channel, stand for the paper's scalar ones.

    Shape: any -> same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_blocks = 1
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with the factor 1."""
        nn.init.ones_(self.weight)

    def start_branch(self, branch: nn.Module) -> None:
        """Make the drawn weights smaller and the last convolution zero.

        Raises:
            ValueError: the branch has no convolutions, or some that standardise their weights, which undoes it.
        """
        if any(isinstance(layer, WeightStandardised) for layer in branch.children()):
            raise ValueError(f"scale Fixup needs convolutions that keep the size of their weights, got {branch}")
        *others, last = branch_weights(branch, ("conv",))
        nn.init.zeros_(last)
        with torch.no_grad():
            for weight in others:
                weight.mul_(self.num_blocks ** (-1 / (2 * len(others))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class WeightedAdd(nn.Module):
    """Weighted sum of shortcut and branch, two learned weights that start at 1 (after Shen and Zeng 2016, eq. 3).

    Shape: two tensors of one shape -> that shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shortcut_weight = nn.Parameter(torch.empty(1))
        self.branch_weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the plain sum."""
        nn.init.ones_(self.shortcut_weight)
        nn.init.ones_(self.branch_weight)

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return self.shortcut_weight * shortcut + self.branch_weight * fitting(branch, shortcut)


class Gated(nn.Module):
    """Highway merge (Srivastava et al. 2015, eq. 3): gate * branch + (1 - gate) * shortcut; read off the shortcut.

    Args:
        channels: of shortcut and branch.
        dims: number of spatial dimensions.
        start: what the gate starts near, before its sigmoid; negative favours the shortcut, as the paper advises.

    Shape: two tensors of one shape -> that shape.
    """

    def __init__(self, channels: int, dims: int = 2, start: float = -2.0) -> None:
        super().__init__()
        check_dims(dims)
        self.start = start
        self.gate = convolution[dims - 1](channels, channels, 1)

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(shortcut) + self.start)
        return (1 - gate) * shortcut + gate * fitting(branch, shortcut)

    def extra_repr(self) -> str:
        return f"start={self.start}"


gated = by_dims(Gated)


# --- resolution


class BlurPool(nn.Module):
    """Binomial 1-2-1 filter, then every stride-th position (Zhang 2019, sec. 3.2).

    Args:
        channels, stride, dims: of the map.
        border: what lies beyond the map: "replicate", "reflect" or "constant", which is zero.

    Shape: (N, channels, L, ...) -> (N, channels, ceil(L / stride), ...).
    """

    def __init__(self, channels: int, stride: int, dims: int = 2, border: str = "replicate") -> None:
        super().__init__()
        check_dims(dims)
        check_positive(channels=channels, stride=stride)
        if border not in ("replicate", "reflect", "constant"):
            raise ValueError(f"border must be replicate, reflect or constant, got {border!r}")
        self.channels, self.stride, self.dims, self.border = channels, stride, dims, border

    def forward(self, x: Tensor) -> Tensor:
        # Made anew, on the device of x: a constant kept as a buffer is lost where a net comes from the meta device.
        line = nn.functional.pad(x.new_full((1,), 0.5), (1, 1), value=0.25)
        kernel = line
        for _ in range(self.dims - 1):
            kernel = kernel[..., None] * line
        weight = kernel.expand(self.channels, 1, *[3] * self.dims)
        padded = nn.functional.pad(x, (1, 1) * self.dims, mode=self.border)
        conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self.dims - 1]
        return conv(padded, weight, stride=self.stride, groups=self.channels)

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}, border={self.border}"


@torch.fx.wrap
def small_avg_pool3d(x: Tensor, window: int) -> Tensor:
    """Average pool over windows that shrink to maps smaller than they are, as those of 1D and 2D do."""
    size = [min(window, size) for size in x.shape[2:]]
    return nn.functional.avg_pool3d(x, size, window, ceil_mode=True, count_include_pad=False)


class _AvgPool3d(nn.AvgPool3d):
    def forward(self, x: Tensor) -> Tensor:
        return small_avg_pool3d(x, cast(int, self.kernel_size))


def _average(pool: Layer, channels: int, stride: int) -> nn.Module:
    return pool(stride, stride, ceil_mode=True, count_include_pad=False)


average_downsample: Family = (
    partial(_average, nn.AvgPool1d),
    partial(_average, nn.AvgPool2d),
    partial(_average, _AvgPool3d),
)
blur_downsample = by_dims(BlurPool)
