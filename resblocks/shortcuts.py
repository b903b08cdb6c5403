"""What goes around a branch: identity; A zero-padding; B projection where the shape changes; C everywhere; D pooled."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from resblocks.checks import check_positive
from resblocks.layers import Stride, average_downsample, named, one_stride
from resblocks.options import BlockLayers


class ZeroPad(nn.Module):
    """Option A (He et al. 2015, sec. 4.1): every stride-th position, new channels of zeros behind the old ones.

    It has no parameters, and gradients flow through it. fb.resnet.torch pads in the same way.

    Shape: (N, in_channels, L, ...) -> (N, out_channels, ceil(L / stride), ...).

    Raises:
        ValueError: fewer channels out than in.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Stride = 1) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels)
        if out_channels < in_channels:
            raise ValueError(
                f"out_channels must not be below in_channels with shortcut A, which only adds channels of zeros, "
                f"got in_channels={in_channels}, out_channels={out_channels}"
            )
        self.new_channels = out_channels - in_channels
        self.stride = one_stride(stride)

    def forward(self, x: Tensor) -> Tensor:
        return zero_padded(x, self.stride, self.new_channels)

    def extra_repr(self) -> str:
        return f"new_channels={self.new_channels}, stride={self.stride}"


@torch.fx.wrap  # torch.fx cannot iterate over the dimensions of a map
def zero_padded(x: Tensor, stride: Stride, new_channels: int) -> Tensor:
    """Every stride-th position of the map, and channels of zeros behind its own."""
    each = (stride,) * (x.dim() - 2) if isinstance(stride, int) else stride
    every = (slice(None), slice(None), *(slice(None, None, step) for step in each))
    return nn.functional.pad(x[every], (0, 0) * (x.dim() - 2) + (0, new_channels))


def make_shortcut(
    make: BlockLayers, in_channels: int, out_channels: int, stride: Stride, *, normed: bool = True
) -> nn.Module:
    """The shortcut that the options ask for, checked against the change of shape.

    Args:
        make: the layers of the block.
        in_channels, out_channels, stride: of the block.
        normed: False leaves projections without norm: those of pre-activation blocks read a normalised map and end
            in a plain sum (He et al. 2016, fig. 4e).

    Raises:
        ValueError: an identity where stride or channels change.
    """
    kind = make.shortcut
    same = make.keeps_shape(in_channels, out_channels, stride)
    if callable(kind):
        shortcut = make.build(kind, in_channels, out_channels, stride, option="shortcut")
    elif kind == "identity" or (same and kind != "C"):
        shortcut = nn.Identity()
    else:
        # D pools whatever `downsample` says, so that no position is lost (He et al. 2019, ResNet-D, fig. 2c).
        pool = make.pool(in_channels, stride, average_downsample if kind == "D" else None)
        stride_left = stride if pool is None else 1
        if kind == "A":
            pad = ZeroPad(in_channels, out_channels, stride_left)
            shortcut = pad if pool is None else named(pool=pool, pad=pad)
        else:
            shortcut = named(
                pool=pool,
                conv=make.conv(in_channels, out_channels, 1, stride_left),
                norm=make.norm(out_channels) if normed else None,
            )
    if isinstance(shortcut, nn.Identity) and (stride != 1 or in_channels != out_channels):
        raise ValueError(
            f"shortcut cannot be an identity where the shape changes, got in_channels={in_channels}, "
            f"out_channels={out_channels}, stride={stride}"
        )
    return shortcut
