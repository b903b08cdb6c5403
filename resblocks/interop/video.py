"""What the video nets of Tran et al. 2018 ("A Closer Look at Spatiotemporal Convolutions") are made of."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import Unpack

from resblocks.checks import check_positive
from resblocks.layers import Stride, named, one_stride
from resblocks.options import BlockLayers, BlockOptions, Layers, with_layers
from resblocks.residual import Residual
from resblocks.shortcuts import make_shortcut


@with_layers
def video_stem(make: Layers, in_channels: int, width: int) -> nn.Module:
    """A 3x7x7 convolution that keeps the frames, without a pool (Tran et al. 2018, table 1)."""
    conv = make.conv(in_channels, width, (3, 7, 7), (1, 2, 2))
    return named(conv=conv, norm=make.norm(width), act=make.activation())


@with_layers
def factorised_stem(make: Layers, in_channels: int, width: int) -> nn.Module:
    """`video_stem` as a convolution over space and one over time, with 45 channels between them as in torchvision."""
    return named(
        spatial=make.conv(in_channels, 45, (1, 7, 7), (1, 2, 2)),
        spatial_norm=make.norm(45),
        spatial_act=make.activation(),
        conv=make.conv(45, width, (3, 1, 1)),
        norm=make.norm(width),
        act=make.activation(),
    )


def spatial_convolution(
    in_channels: int, out_channels: int, kernel_size: Stride, *, padding: Stride, **options: Any
) -> nn.Module:
    """A convolution of the images of a video, each alone: a value for `conv` (MCx and f-R2D of Tran et al. 2018)."""
    _, *size = of_three(kernel_size)
    _, *padded = of_three(padding)
    space: dict[str, Any] = {"kernel_size": (1, *size), "padding": (0, *padded)}
    return nn.Conv3d(in_channels, out_channels, **space, **options)


def of_three(size: Stride) -> tuple[int, ...]:
    """For time, height and width."""
    return (size,) * 3 if isinstance(size, int) else size


class FactorisedBlock(Residual):
    """`BasicBlock` for videos, each convolution as one over space and one over time (Tran et al. 2018, fig. 2b).

    Between the two stand so many channels that both have the weights of a 3x3x3 convolution; for the second pair their
    number is that of the first, as in torchvision, where the paper counts them anew.

    Args:
        in_channels, out_channels, stride, skip: as in `BasicBlock`.
        options: `resblocks.options.BlockLayers` documents them; `dims` is 3.

    Shape: (N, in_channels, T, H, W) -> (N, out_channels, ceil(T / stride), ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: `dims` is not 3; what `BasicBlock` raises.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Stride = 1,
        *,
        skip: bool = True,
        **options: Unpack[BlockOptions],
    ) -> None:
        options.setdefault("dims", 3)
        make = BlockLayers(**options)
        if make.dims != 3:
            raise ValueError(f"dims must be 3 in a block for videos, got {make.dims}")
        stride = one_stride(stride, 3)
        time, height, width = of_three(stride)
        check_positive(in_channels=in_channels, out_channels=out_channels)
        middle = in_channels * out_channels * 27 // (in_channels * 9 + out_channels * 3)
        branch = named(
            spatial1=make.strided_conv(in_channels, middle, (1, 3, 3), (1, height, width)),
            spatial_norm1=make.norm(middle),
            spatial_act1=make.activation(),
            conv1=make.strided_conv(middle, out_channels, (3, 1, 1), (time, 1, 1)),
            norm1=make.norm(out_channels),
            act1=make.activation(),
            pool1=make.pool(out_channels, stride),
            dropout=make.dropout(),
            spatial2=make.conv(out_channels, middle, (1, 3, 3), dilation=make.dilation),
            spatial_norm2=make.norm(middle),
            spatial_act2=make.activation(),
            conv2=make.conv(middle, out_channels, (3, 1, 1), dilation=make.dilation),
            norm2=(last := make.norm(out_channels)),
            attention=make.attention(out_channels, last),
        )
        shortcut = make_shortcut(make, in_channels, out_channels, stride) if skip else None
        super().__init__(branch, shortcut, act=make.activation(), **make.parts(out_channels, skip))
        self.out_channels = out_channels
