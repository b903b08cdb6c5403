"""3x3 convolutions with a quarter of the multiplications: Winograd's algorithm (Lavin and Gray 2016, arXiv 1509.09308).

A tile of 4x4 outputs is a polynomial product that 6x6 points decide, so a tile costs 36 multiplications for each pair
of channels where the definition takes 144. With d the 6x6 inputs of a tile and g the filter::

    y = A^T [(G g G^T) * (B^T d B)] A

and over all channels the product in the middle is 36 matrix products. All transforms are matrix products too. The
points 0, +-3/4, +-3/2 and infinity lose about one bit more than the definition, the usual 0, +-1, +-2 three.

Some tiles at a time go through all steps, so that what lies between the steps stays in the processor's cache.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

TILE, WINDOW = 4, 6
SPAN = 128  # tiles that go through all steps together; more where there are more channels, to read the weight seldom
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)


class Transforms(NamedTuple):
    """The matrices of the formula: B^T of the input, G of the filter, A^T of the output."""

    input: Tensor
    filter: Tensor
    output: Tensor


@cache
def transforms() -> Transforms:
    """In float64 where the weight is made, once, and in float32 where it is used."""
    of_output, of_filter, of_input = (_vandermonde(columns) for columns in (TILE, 3, WINDOW))
    of_input = torch.linalg.inv(of_input).T
    # The rows of input and filter may be scaled against each other: in powers of two, to rows of one size.
    scale = torch.exp2(torch.log2(of_input.abs().sum(1) / 2).round())[:, None]
    return Transforms((of_input / scale).float(), of_filter * scale, of_output.T.contiguous().float())


def _vandermonde(columns: int) -> Tensor:
    rows = [[point**power for power in range(columns)] for point in POINTS]
    at_infinity = [0.0] * (columns - 1) + [1.0]
    return torch.tensor([*rows, at_infinity], dtype=torch.float64, device="cpu")


def transform_weight(weight: Tensor) -> Tensor:
    """Shape: (O, C, 3, 3) -> (36, C, O)."""
    matrix = transforms().filter
    points = torch.einsum("ax,by,ocxy->abco", matrix, matrix, weight.detach().double())
    return points.flatten(0, 1).to(weight.dtype).contiguous()


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """The convolution with padding 1, rectified on request; `weight` is what `transform_weight` gave.

    Shape: (N, C, H, W) -> (N, O, H, W), in channels_last.
    """
    (n, channels, height, width), out = x.shape, weight.shape[-1]
    rows, columns = -(-height // TILE), -(-width // TILE)
    maps = x.new_empty(n, rows, TILE, columns, TILE, out)
    span = max(channels, SPAN)
    samples, lines = max(1, span // (rows * columns)), max(1, span // columns)
    for start in range(0, n, samples):
        some = x[start : start + samples]
        padded = x.new_zeros(len(some), rows * TILE + 2, columns * TILE + 2, channels)
        padded[:, 1 : height + 1, 1 : width + 1] = some.permute(0, 2, 3, 1)
        tiles = padded.unfold(1, WINDOW, TILE).unfold(2, WINDOW, TILE)
        for top in range(0, rows, lines):
            part, into = tiles[:, top : top + lines], maps[start : start + samples, top : top + lines]
            points = _both_ways(transforms().input, part.permute(4, 5, 0, 1, 2, 3)).view(WINDOW**2, -1, channels)
            y = _both_ways(transforms().output, torch.bmm(points, weight).view(WINDOW, WINDOW, -1))
            y = y.view(TILE, TILE, *part.shape[:3], out).permute(2, 3, 0, 4, 1, 5)
            torch.add(y, 0 if bias is None else bias, out=into)
            if relu:
                into.relu_()
    whole = maps.view(n, rows * TILE, columns * TILE, out).permute(0, 3, 1, 2)
    return whole[:, :, :height, :width].contiguous(memory_format=torch.channels_last)


def _both_ways(matrix: Tensor, tiles: Tensor) -> Tensor:
    """matrix @ tile @ matrix.T for the tiles that the first two dimensions hold. Shape: (a, a, ...) -> (b, b, M)."""
    size = len(tiles)
    half = (matrix @ tiles.reshape(size, -1)).view(len(matrix), size, -1)
    return torch.matmul(matrix, half)
