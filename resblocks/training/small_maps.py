"""3x3 convolutions with small output maps as matrix products, on the CPU, where oneDNN loses most of its speed.

A map of 4x4 positions leaves a convolution little to slide over. The product of the windows with the kernel,
`(N * H * W, 9 * C) @ (9 * C, D)`, is the same sum and runs at the speed of a matrix product. Which passes it pays for
was measured (`benchmarks/train_step.py --only small_maps`; docs/performance.md): the gradient of the weight; all three
in bfloat16 on a processor with matrix tiles, and for wide convolutions on one of AMD; in float32 hardly any on the
latter, since products are MKL's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from resblocks._products import is_amd, is_mkl_slow
from resblocks.layers import layout_of
from resblocks.watched import is_traced

from .device import has_fast_bfloat16, has_matrix_tiles

aten = torch.ops.aten

POSITIONS = 16  # of the output map: at 8x8 it is a draw or a loss
POSITIONS_BFLOAT16 = 4  # without a stride and without matrix tiles: at 4x4 it is a draw or a loss
CHANNELS = 256  # of input and output: narrow convolutions are too quick to gain
WIDE = 512  # channels from which on a processor of AMD all passes in bfloat16 gain at 4x4


class SmallMapConv2d(nn.Conv2d):
    """`nn.Conv2d`, with matrix products where they are faster: on the CPU, 3x3, padding 1, at most 4x4 positions out.

    Everywhere else it is `nn.Conv2d` to the bit. Results differ from it by rounding.

    Shape: as `nn.Conv2d`.

    Example:
        >>> conv = SmallMapConv2d(256, 256, 3, padding=1)
        >>> conv(torch.randn(2, 256, 4, 4)).shape
        torch.Size([2, 256, 4, 4])
    """

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x) or x.dim() != 4 or not torch.is_grad_enabled() or not self._fits(x):
            return super().forward(x)
        dtype = dtype_of_product(x, self.weight)
        everything = dtype == torch.bfloat16 and self._gains_throughout(x)
        if dtype is None or not (everything or self._gains(x, dtype)):
            return super().forward(x)
        out: Tensor = _Product.apply(x.to(dtype), self.weight.to(dtype), self.stride[0], everything)
        return out

    def _fits(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and is_eligible(self) and positions(x, self.stride[0]) <= POSITIONS

    def _gains_throughout(self, x: Tensor) -> bool:
        """Whether products of all passes do, in bfloat16."""
        wide = min(self.in_channels, self.out_channels) >= WIDE
        return has_matrix_tiles() or (is_amd() and (wide or self._has_little_to_slide_over(x)))

    def _gains(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether the product of the weight's gradient alone does."""
        if dtype == torch.bfloat16:
            return is_amd() or self._has_little_to_slide_over(x)
        return dtype != torch.float32 or not is_mkl_slow() or positions(x, self.stride[0]) == 1

    def _has_little_to_slide_over(self, x: Tensor) -> bool:
        return self.stride[0] > 1 or positions(x, 1) <= POSITIONS_BFLOAT16


def dtype_of_product(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """What a convolution of the two computes in, autocast minded; None where a product cannot, or would be slow."""
    dtypes = {x.dtype, weight.dtype}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in dtypes:  # which autocast leaves alone
        dtypes = {torch.get_autocast_dtype("cpu")}
    dtype = dtypes.pop()
    if dtypes or dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return None
    return None if dtype == torch.bfloat16 and not has_fast_bfloat16(x.device) else dtype


def check_small_maps(device: torch.device, compile: bool) -> None:
    """Raise where the products would never be used."""
    if device.type != "cpu":
        raise ValueError(f"small_maps must be False away from the CPU, got device {device}")
    if compile:
        raise ValueError("small_maps must be False with compile=True: the compiler calls its own convolutions")


def is_eligible(conv: nn.Conv2d) -> bool:
    """Whether a convolution is of the kind and width that may gain, whatever the size of its maps."""
    square = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.dilation == (1, 1)
    plain = conv.groups == 1 and conv.bias is None and conv.padding_mode == "zeros"
    return square and plain and len(set(conv.stride)) == 1 and min(conv.in_channels, conv.out_channels) >= CHANNELS


def positions(x: Tensor, stride: int) -> int:
    """Positions of the map that a 3x3 convolution with padding 1 puts out."""
    height, width = (1 + (size - 1) // stride for size in x.shape[2:])
    return height * width


@contextlib.contextmanager
def small_map_products(net: nn.Module) -> Iterator[list[str]]:
    """Let the convolutions of a net use matrix products for a while, and give the names of those that may.

    Exactly `nn.Conv2d` are meant; subclasses stay what they are. Weights and state dict are untouched.

    Raises:
        ValueError: no convolution of the net is of the kind.
    """
    found = {name: module for name, module in net.named_modules() if type(module) is nn.Conv2d and is_eligible(module)}
    if not found:
        raise ValueError(
            f"small_maps needs a 3x3 nn.Conv2d without bias and groups, of at least {CHANNELS} channels in and out, "
            f"got {type(net).__name__} without any"
        )
    for conv in found.values():
        conv.__class__ = SmallMapConv2d
    try:
        yield list(found)
    finally:
        for conv in found.values():
            conv.__class__ = nn.Conv2d


class _Product(torch.autograd.Function):
    """A 3x3 convolution with padding 1; `everything` takes all passes as products, else the weight's gradient alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, everything: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.everything = stride, everything
        if everything:
            return _convolve(x, rearrange(weight, "d c i j -> (i j c) d"), stride)
        return functional.conv2d(x, weight, None, stride, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            if ctx.everything and ctx.stride == 1:  # then it is a convolution with the kernel turned round
                dx = _convolve(grad, torch.cat(weight.flatten(2).unbind(2)[::-1]), 1)
            else:
                geometry = [ctx.stride] * 2, [1, 1], [1, 1], False, [0, 0], 1
                dx = aten.convolution_backward(grad, x, weight, None, *geometry, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            product = rearrange(grad, "n d h w -> d (n h w)") @ _windows(x, ctx.stride)
            dweight = rearrange(product, "d (i j c) -> d c i j", i=3, j=3).contiguous(memory_format=layout_of(weight))
        return dx, dweight, None, None


def _convolve(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Shape: (N, C, H, W), (9 * C, D) -> (N, D, H / stride, W / stride)."""
    product = _windows(x, stride) @ kernel
    height = 1 + (x.shape[2] - 1) // stride
    out = rearrange(product, "(n h w) d -> n d h w", n=len(x), h=height)
    return out.contiguous(memory_format=layout_of(x))


def _windows(x: Tensor, stride: int) -> Tensor:
    """What a 3x3 kernel sees at each position. Shape: (N, C, H, W) -> (N * H * W / stride ** 2, 9 * C)."""
    padded = functional.pad(rearrange(x, "n c h w -> n h w c"), (0, 0, 1, 1, 1, 1))
    windows: Tensor = rearrange(padded.unfold(1, 3, stride).unfold(2, 3, stride), "n h w c i j -> (n h w) (i j c)")
    return windows
