"""The blocks of the papers: each class is one figure, a `Residual` whose branch, shortcut and merge are filled in."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from resblocks.checks import check_flag, check_positive
from resblocks.dense import run_block, run_pool
from resblocks.dense_plan import Memory, check_memory, pool_commutes
from resblocks.layers import Stride, avg_pool, named, one_stride
from resblocks.options import BlockLayers, BlockOptions, LayerOptions, Layers
from resblocks.residual import Concat, Residual
from resblocks.shortcuts import make_shortcut


class BasicBlock(Residual):
    """Two 3x3 convolutions (He et al. 2015, fig. 5 left).

    Args:
        in_channels, out_channels: of the block.
        stride: of the first convolution, the same in all dimensions or a tuple with one for each.
        groups: groups of both convolutions.
        skip: False drops the shortcut and its weights, giving the plain net of He et al.
        options: `resblocks.options.BlockLayers` documents them.

    Shape: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)); likewise in 1D and 3D.

    Raises:
        ValueError: a size below 1, groups that do not divide the channels, an identity where the shape changes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride = 1,
        *,
        groups: int = 1,
        skip: bool = True,
        **options: Unpack[BlockOptions],
    ) -> None:
        make = BlockLayers(**options)
        stride = one_stride(stride, make.dims)
        branch = named(
            conv1=make.strided_conv(in_channels, out_channels, 3, stride, groups=groups),
            norm1=make.norm(out_channels),
            act1=make.activation(),
            pool1=make.pool(out_channels, stride),
            dropout=make.dropout(),
            conv2=make.conv(out_channels, out_channels, 3, dilation=make.dilation, groups=groups),
            norm2=(last := make.norm(out_channels)),
            attention=make.attention(out_channels, last),
        )
        shortcut = make_shortcut(make, in_channels, out_channels, stride) if skip else None
        super().__init__(branch, shortcut, act=make.activation(), **make.parts(out_channels, skip))
        self.out_channels = out_channels


class Bottleneck(Residual):
    """1x1 reduce, 3x3, 1x1 expand (He et al. 2015, fig. 5 right; with groups: Xie et al. 2017, fig. 3c).

    The stride sits on the 3x3 (as in torchvision, "v1.5"). The paper puts it on the first 1x1, which drops three
    quarters of the positions unread: `stride_first=True`.

    Args:
        in_channels, out_channels, stride: of the block.
        groups: groups of the 3x3 convolution, the cardinality C of Xie et al.
        base_width: channels of one group of the 3x3 convolution for out_channels = 64 * expansion, d of Xie et al.;
            128 with one group is wide_resnet50_2.
        expansion: out_channels over the inner width at base_width 64.
        stride_first: whether the stride, or the pool of `downsample` in its place, sits on the first 1x1, as in the
            paper and in what was trained with Caffe.
        skip: False drops the shortcut and its weights.
        options: `resblocks.options.BlockLayers` documents them.

    Shape: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)); likewise in 1D and 3D.

    Raises:
        ValueError: out_channels is not a multiple of expansion, or leaves no channel for a group; stride_first is no
            bool.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride = 1,
        *,
        groups: int = 1,
        base_width: int = 64,
        expansion: int = 4,
        stride_first: bool = False,
        skip: bool = True,
        **options: Unpack[BlockOptions],
    ) -> None:
        make = BlockLayers(**options)
        stride = one_stride(stride, make.dims)
        check_flag(stride_first=stride_first)
        width = bottleneck_width(out_channels, groups, base_width, expansion)
        if stride_first:
            conv1 = make.strided_conv(in_channels, width, 1, stride)
            conv2 = make.conv(width, width, 3, dilation=make.dilation, groups=groups)
        else:
            conv1 = make.conv(in_channels, width, 1)
            conv2 = make.strided_conv(width, width, 3, stride, groups=groups)
        pool = make.pool(width, stride)
        branch = named(
            conv1=conv1,
            norm1=make.norm(width),
            act1=make.activation(),
            pool1=pool if stride_first else None,
            conv2=conv2,
            norm2=make.norm(width),
            act2=make.activation(),
            pool2=None if stride_first else pool,
            dropout=make.dropout(),
            conv3=make.conv(width, out_channels, 1),
            norm3=(last := make.norm(out_channels)),
            attention=make.attention(out_channels, last),
        )
        shortcut = make_shortcut(make, in_channels, out_channels, stride) if skip else None
        super().__init__(branch, shortcut, act=make.activation(), **make.parts(out_channels, skip))
        self.out_channels = out_channels


def bottleneck_width(out_channels: int, groups: int, base_width: int, expansion: int) -> int:
    """Inner width D * C of a bottleneck (Xie et al. 2017, table 1; D as in their code)."""
    check_positive(out_channels=out_channels, groups=groups, base_width=base_width, expansion=expansion)
    if out_channels % expansion:
        raise ValueError(f"out_channels must be a multiple of expansion, got {out_channels} with expansion={expansion}")
    width = out_channels // expansion * base_width // 64 * groups
    if width == 0:
        raise ValueError(
            f"out_channels must leave each group a channel (out_channels // expansion * base_width >= 64), "
            f"got out_channels={out_channels}, expansion={expansion}, base_width={base_width}"
        )
    return width


class ResNeXtBlock(Bottleneck):
    """Bottleneck with many narrow groups (Xie et al. 2017, fig. 3c).

    Args:
        cardinality: number of groups C; the paper's default is 32.
        base_width: channels of one group for out_channels = 256, d of the paper; the default is 4.

    Otherwise as `Bottleneck`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride = 1,
        *,
        cardinality: int = 32,
        base_width: int = 4,
        expansion: int = 4,
        skip: bool = True,
        **options: Unpack[BlockOptions],
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            stride,
            groups=cardinality,
            base_width=base_width,
            expansion=expansion,
            skip=skip,
            **options,
        )


class PreActBasicBlock(Residual):
    """Two 3x3 convolutions, each after its norm and activation (He et al. 2016, fig. 4e).

    Where the shape changes, the shortcut reads the first activation too, as in the authors' code. The first unit of a
    net is like the others, as in timm; the paper's appendix lets its shortcut, too, read the first activation.

    Args and Shape: as `BasicBlock`. The output is not activated; a net puts a norm and an activation before its head.
    """

    preactivated = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride = 1,
        *,
        groups: int = 1,
        skip: bool = True,
        **options: Unpack[BlockOptions],
    ) -> None:
        make = BlockLayers(**options)
        stride = one_stride(stride, make.dims)
        preact, first = fork(make, in_channels, out_channels, stride)
        branch = named(
            **first,
            conv1=make.strided_conv(in_channels, out_channels, 3, stride, groups=groups),
            norm2=make.norm(out_channels),
            act2=make.activation(),
            pool1=make.pool(out_channels, stride),
            dropout=make.dropout(),
            conv2=make.conv(out_channels, out_channels, 3, dilation=make.dilation, groups=groups),
            attention=make.attention(out_channels),
        )
        shortcut = make_shortcut(make, in_channels, out_channels, stride, normed=False) if skip else None
        super().__init__(branch, shortcut, preact=preact, **make.parts(out_channels, skip))
        self.out_channels = out_channels


class PreActBottleneck(Residual):
    """1x1 reduce, 3x3, 1x1 expand, each after its norm and activation (He et al. 2016, sec. 4 and appendix).

    Args, Shape, Raises: as `Bottleneck`. The output is not activated; a net puts norm and activation before its head.
    """

    preactivated = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride = 1,
        *,
        groups: int = 1,
        base_width: int = 64,
        expansion: int = 4,
        skip: bool = True,
        **options: Unpack[BlockOptions],
    ) -> None:
        make = BlockLayers(**options)
        stride = one_stride(stride, make.dims)
        width = bottleneck_width(out_channels, groups, base_width, expansion)
        preact, first = fork(make, in_channels, out_channels, stride)
        branch = named(
            **first,
            conv1=make.conv(in_channels, width, 1),
            norm2=make.norm(width),
            act2=make.activation(),
            conv2=make.strided_conv(width, width, 3, stride, groups=groups),
            norm3=make.norm(width),
            act3=make.activation(),
            pool2=make.pool(width, stride),
            dropout=make.dropout(),
            conv3=make.conv(width, out_channels, 1),
            attention=make.attention(out_channels),
        )
        shortcut = make_shortcut(make, in_channels, out_channels, stride, normed=False) if skip else None
        super().__init__(branch, shortcut, preact=preact, **make.parts(out_channels, skip))
        self.out_channels = out_channels


def fork(
    make: BlockLayers, in_channels: int, out_channels: int, stride: Stride
) -> tuple[nn.Module | None, dict[str, nn.Module | None]]:
    """Where the first norm and activation of a pre-activation block go: (before the fork, into the branch).

    They go before the fork, so that the shortcut reads them, where it is a projection: with the shape changed, or with
    shortcut C. They go into the branch elsewhere. The place does not depend on the skip: a plain net has the names of
    its residual twin.
    """
    first = {"norm1": make.norm(in_channels), "act1": make.activation()}
    if make.keeps_shape(in_channels, out_channels, stride) and make.shortcut != "C":
        return None, first
    return named(**first), {}


class WideBlock(PreActBasicBlock):
    """The pre-activation basic block of wide residual networks (Zagoruyko and Komodakis 2016, fig. 1c, 1d).

    The width comes from the net: its widths are 16, 32, 64 times widen_factor. With `dropout` there is a dropout
    layer between the convolutions.

    Args, Shape, Raises: as `BasicBlock`.
    """


class DenseLayer(Residual):
    """Norm, activation, 1x1, norm, activation, 3x3, put beside the input (Huang et al. 2017, sec. 3, DenseNet-B).

    Args:
        in_channels: channels of the input, all of which stay.
        out_channels: channels with the input's among them: in_channels + growth rate.
        stride: 1, since the input is part of the output.
        bn_size: width of the 1x1 convolution in growth rates; None leaves it out (the plain DenseNet).
        skip: False puts out the growth_rate new channels alone; the attribute `out_channels` tells what comes out.
        options: `resblocks.options.BlockLayers` documents them; those of a sum (scale, drop_path, ...) are refused.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H, W); likewise in 1D and 3D.

    Raises:
        ValueError: stride is not 1, out_channels not above in_channels, a shortcut other than the identity.
    """

    preactivated = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride = 1,
        *,
        bn_size: int | None = 4,
        skip: bool = True,
        **options: Unpack[BlockOptions],
    ) -> None:
        growth_rate = check_growth(in_channels, out_channels, stride)
        make = dense_layers(options)
        check_positive(bn_size=1 if bn_size is None else bn_size)
        width, reduction = in_channels, {}
        if bn_size is not None:
            width = bn_size * growth_rate
            reduction = {
                "conv1": make.conv(in_channels, width, 1),
                "norm2": make.norm(width),
                "act2": make.activation(),
            }
        branch = named(
            norm1=make.norm(in_channels),
            act1=make.activation(),
            **reduction,
            conv2=make.conv(width, growth_rate, 3, dilation=make.dilation),
            dropout=make.dropout(),
        )
        parts = make.parts(growth_rate, skip)
        parts["merge"] = Concat() if skip else None
        super().__init__(branch, **parts)
        self.out_channels = out_channels if skip else growth_rate


def check_growth(in_channels: int, out_channels: int, stride: Stride) -> int:
    """The channels that a dense layer or block adds, at least one, at stride 1."""
    check_positive(in_channels=in_channels, out_channels=out_channels)
    if out_channels <= in_channels:
        raise ValueError(
            f"out_channels must be above in_channels, which a dense block keeps and adds to, "
            f"got in_channels={in_channels}, out_channels={out_channels}"
        )
    if stride != 1:
        raise ValueError(
            f"stride must be 1 in a dense block, whose output holds its input, got {stride}; use a Transition"
        )
    return out_channels - in_channels


NOT_DENSE = ("attention", "shortcut", "downsample", "drop_path", "scale", "merge", "first_dilation")
DENSE_OPTIONS = [name for name in BlockOptions.__annotations__ if name not in NOT_DENSE]


def dense_layers(options: BlockOptions) -> BlockLayers:
    """The layers of a dense block, refusing the options that have no meaning where the merge is a concatenation."""
    for name, value in options.items():
        if name in NOT_DENSE:
            raise ValueError(f"{name} has no meaning in a dense block, which concatenates, got {value!r}")
    return BlockLayers(**options)


class Sliceable(nn.Sequential):
    """A sequence with a constructor of its own, whose slices are plain sequences of the same layers."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict([*self._modules.items()][index]))
        return super().__getitem__(index)


class DenseBlock(Sliceable):
    """Dense layers in a row, each reading what all before it put out (Huang et al. 2017, fig. 1).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, the input's among them: in_channels + layers * growth_rate.
        stride: 1; a `Transition` reduces the resolution.
        growth_rate: channels that each layer adds, k of the paper.
        bn_size: as in `DenseLayer`.
        skip: False chains the layers without concatenation; the attribute `out_channels` tells what comes out.
        memory: "shared" keeps for backward the maps and the output of each 1x1 convolution and rebuilds the normalised
            maps from statistics taken once; "lean" keeps the maps alone; "plain" calls the layers one by one. Results,
            gradients, running statistics and state dict are the same. `resblocks.dense` says how it works and
            where the layers are called one by one all the same (hooks on them, another norm, torch.compile, ...).
            Only the output of "plain" may be changed in place; gradients of gradients take the memory of "plain".
        options: `resblocks.options.BlockLayers` documents them.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H, W); likewise in 1D and 3D.

    Raises:
        ValueError: out_channels - in_channels is not a positive multiple of growth_rate, memory is none of these; as
            `DenseLayer`.
    """

    preactivated = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride = 1,
        *,
        growth_rate: int = 32,
        bn_size: int | None = 4,
        skip: bool = True,
        memory: Memory = "shared",
        **options: Unpack[BlockOptions],
    ) -> None:
        super().__init__()
        growth = check_growth(in_channels, out_channels, stride)
        check_positive(growth_rate=growth_rate)
        check_memory(memory)
        if growth % growth_rate:
            raise ValueError(
                f"out_channels - in_channels must be a multiple of growth_rate, got {out_channels} - {in_channels} "
                f"with growth_rate={growth_rate}"
            )
        channels = in_channels
        for number in range(1, growth // growth_rate + 1):
            layer = DenseLayer(channels, channels + growth_rate, bn_size=bn_size, skip=skip, **options)
            self.add_module(f"layer{number}", layer)
            channels = layer.out_channels
        self.memory, self.out_channels = memory, channels

    def forward(self, x: Tensor) -> Tensor:
        out = run_block(self, x, self.memory)
        return super().forward(x) if out is None else out  # type: ignore[no-untyped-call]


class Transition(Sliceable):
    """Norm, activation, 1x1 convolution, average pool between dense blocks (Huang et al. 2017, sec. 3).

    The pool runs before the convolution: both are linear and the one works within positions, the other within
    channels, so the result is the paper's, at 1 / stride ** 2 of the convolution's cost.

    Args:
        in_channels, out_channels: of the convolution; out_channels / in_channels is the compression theta.
        stride: window and step of the pool.
        memory: "shared" or "lean" keep the input alone for backward and rebuild the activation; "plain" calls the
            layers one by one.
        options: `resblocks.options.Layers` documents them.

    Shape: (N, in_channels, H, W) -> (N, out_channels, H // stride, W // stride); likewise in 1D and 3D.

    Raises:
        ValueError: a size below 1, memory is none of these.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 2,
        *,
        memory: Memory = "shared",
        **options: Unpack[LayerOptions],
    ) -> None:
        super().__init__()
        check_memory(memory)
        make = Layers(**options)
        self.norm = make.norm(in_channels)
        self.act = make.activation()
        self.conv = make.conv(in_channels, out_channels, 1)
        check_positive(stride=stride)
        self.pool = make.build(avg_pool, stride)
        self.memory, self.out_channels = memory, out_channels

    def forward(self, x: Tensor) -> Tensor:
        *before, first, last = self
        if pool_commutes(first, last):
            first, last = last, first
        out = run_pool(before, first, x, self.memory)
        if out is None:
            out = x
            for layer in (*before, first):
                out = layer(out)
        y: Tensor = last(out)
        return y
