"""Attention at the end of a branch: gates for channels and positions, in 1D, 2D and 3D."""

from __future__ import annotations

from math import log2

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from resblocks.checks import check_dims, check_positive
from resblocks.layers import by_dims, convolution, over_positions

# einops looks at the tensor it is given, which torch.fx cannot trace: its calls stay whole in the graph.
torch.fx.wrap("rearrange")
torch.fx.wrap("reduce")


class SE(nn.Module):
    """Squeeze and excitation (Hu et al. 2018, fig. 1): a gate for each channel from the mean of all channels.

    Args:
        channels: of the input.
        reduction: the hidden layer has channels / reduction units.
        min_hidden: but not fewer than this, nor than there are channels.

    Shape: (N, channels, ...) -> same.

    Raises:
        ValueError: channels, reduction or min_hidden are below 1.
    """

    def __init__(self, channels: int, reduction: int = 16, min_hidden: int = 8) -> None:
        super().__init__()
        check_positive(channels=channels, reduction=reduction, min_hidden=min_hidden)
        hidden = max(channels // reduction, min(min_hidden, channels))
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

    Args:
        channels: of the input.

    Shape: (N, channels, ...) -> same.

    Raises:
        ValueError: channels are below 1.
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
        reduction: the hidden layer has channels / reduction units, but at least min(8, channels).
        kernel_size: of the convolution that makes the positions' gate.

    Shape: (N, channels, ...) -> same.

    Raises:
        ValueError: channels, reduction or kernel_size are below 1, dims are not 1, 2 or 3, kernel_size is even.
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


#: `CBAM` for 1D, 2D and 3D, the value for the option `attention`.
#:
#: :meta hide-value:
cbam = by_dims(CBAM)
