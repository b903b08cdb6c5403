"""What dense blocks and transitions are made of: maps and their gradients, convolution behind norm and rectifier.

`resblocks.dense` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resblocks._products import convolved, multiply, multiply_backward
from resblocks.dense_plan import geometry
from resblocks.layers import layout_of, over_positions, scaled

aten = torch.ops.aten

# Bytes of one chunk of samples. 2 MiB is where the time is flat on a CPU with 0.5 MiB of second-level cache; on an
# accelerator, where few large kernels are best, the number only bounds the scratch.
CPU_CHUNK, DEVICE_CHUNK = 2**21, 2**29

Affine = tuple[Tensor, Tensor]  # scale and shift, with a dimension for each of the positions'
# A span of the samples; what a norm reads there; the gradient behind the rectifier, and what the rectifier put out.
Part = tuple[slice, Tensor, Tensor, Tensor]


class Maps(NamedTuple):
    """Raw maps with the mean and rstd of each over the batch."""

    x: Tensor
    mean: Tensor
    rstd: Tensor

    def affine(self, gamma: Tensor, beta: Tensor) -> Affine:
        """Scale and shift of a norm that reads the first maps."""
        scale = gamma * self.rstd[: len(gamma)]
        shift = beta - scale * self.mean[: len(gamma)]
        return over_positions(scale, self.x), over_positions(shift, self.x)


class MapGradients:
    """The gradients of maps: G, S1 and S2 of the formulas above."""

    def __init__(self, maps: Maps, grad: Tensor) -> None:
        self.maps, self.grad = maps, grad
        self.s1, self.s2 = torch.zeros_like(maps.mean), torch.zeros_like(maps.mean)

    def add(self, gamma: Tensor, affine: Affine, parts: Iterable[Part]) -> tuple[Tensor, Tensor]:
        """Add what a reader of the first maps hands back, span by span; return its dgamma and dbeta."""
        c, kernels = len(gamma), kernels_for(self.grad)
        grad, mean, rstd = self.grad[:, :c], self.maps.mean[:c], self.maps.rstd[:c]
        dgamma, dbeta = torch.zeros_like(mean), torch.zeros_like(mean)
        for span, x, dz, z in parts:
            if kernels is not None:
                more = kernels.accumulate(dz, x, *affine, mean, rstd, grad[span])
            else:
                # Batch norm's own backward takes both sums in one pass, and does not cancel between x and mean.
                dz, given = rectify(dz, z).to(x.dtype), (mean, rstd**-2, None, None)
                if x.dtype == mean.dtype:
                    outputs = [False, True, True]
                    more = aten.native_batch_norm_backward(dz, x, gamma, *given, False, 0.0, outputs)[1:]
                    grad[span].addcmul_(dz, affine[0])
                else:  # a product of two dtypes is many times slower than scale * dz from the same pass
                    dx, *more = aten.native_batch_norm_backward(dz, x, gamma, *given, False, 0.0, [True] * 3)
                    grad[span].add_(dx)
            dgamma += more[0]
            dbeta += more[1]
        self.s1[:c] += gamma * dbeta
        self.s2[:c] += gamma * dgamma
        return dgamma, dbeta

    def finish(self, which: slice, span: slice = slice(None)) -> Tensor:
        """The gradients of maps that have had all their readers, for a span of the samples."""
        mean, rstd = self.maps.mean[which], self.maps.rstd[which]
        count = self.grad.numel() // self.grad.shape[1]
        slope = -(rstd**2) * self.s2[which] / count
        offset = -rstd * self.s1[which] / count - slope * mean
        x = self.maps.x[span, which]
        return scaled(x, over_positions(slope, x), over_positions(offset, x)).add_(self.grad[span, which])


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, in at least float32."""
    wide = wide_dtype(x.dtype)
    if x.device.type == "cpu":  # torch.var_mean is 4 to 25 times slower there
        narrow = packed(x) if x.dtype != wide else x  # its fast path for them wants no gaps
        unused = x.new_zeros((2, x.shape[1]), dtype=wide)  # running statistics, which say what dtype to sum in
        mean, var = aten.batch_norm_update_stats(narrow, *unused, 0.0)
    else:
        var, mean = torch.var_mean(x.to(wide), [0, *range(2, x.dim())], correction=0)
    return mean, var


def kernels_for(x: Tensor) -> Any:
    """The module of Triton's kernels where they run and are right, else None."""
    return find_kernels(x.device, x.dtype) if x.is_cuda else None


@cache
def find_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    try:
        from resblocks import _dense_triton
    except ImportError:
        return None
    return _dense_triton if _dense_triton.runs_right(device, dtype) else None


def activate(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    if (kernels := kernels_for(x)) is not None:
        found: Tensor = kernels.activate(x, scale, shift, dtype)
        return found
    if x.device.type == "cpu" and x.dtype == dtype == torch.bfloat16:
        return activate_narrow(packed(x), scale.flatten(), shift.flatten())
    return scaled(x, scale, shift).relu_().to(dtype)


def activate_narrow(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The same in bfloat16 on a CPU, where batch norm's forward is the fast way to round once, from float32."""
    z: Tensor = aten.native_batch_norm(x, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0, 0)[0]
    # relu_ takes five times as long as integers, which know the sign of all but NaN. A NaN of the norm shows in shift;
    # one of x is in the output of the block, too.
    return z.view(torch.int16).clamp_(min=0).view(x.dtype) if math.isfinite(shift.sum().item()) else z.relu_()


def rectify(dz: Tensor, z: Tensor) -> Tensor:
    """dz, in place, where z is above zero."""
    out: Tensor = aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)
    return out


def convolve(x: Tensor, affine: Affine, weight: Tensor, conv: Any, out: Tensor) -> None:
    """out = conv(relu(scale * x + shift))."""
    product = is_product(conv, x, weight)
    for span in spans_of(x):
        z = activate(x[span], *affine, weight.dtype)
        if product:
            multiply(as_rows(z, x), weight.flatten(1), as_rows(out[span], x))
        else:
            out[span] = aten.convolution(z, weight, None, *geometry(conv))


def convolve_backward(
    dy: Tensor, x: Tensor, affine: Affine, weight: Tensor, conv: Any, dweight: Tensor | None
) -> Iterator[Part]:
    """The gradient behind the rectifier of `convolve`, span by span; adds the weight's to dweight."""
    product = is_product(conv, x, weight)
    for span in spans_of(x):
        part = packed(x[span])
        z = activate(part, *affine, weight.dtype)
        if product:
            flat = None if dweight is None else dweight.flatten(1)
            dz = as_maps(multiply_backward(as_rows(dy[span], x), as_rows(z, x), weight.flatten(1), flat), z)
        else:
            wanted = [True, dweight is not None, False]
            dz, more, _ = aten.convolution_backward(dy[span], z, weight, None, *geometry(conv), wanted)
            if dweight is not None:
                dweight.add_(more)
        yield span, part, dz, z


def convolve_with(x: Tensor, conv: Any, weight: Tensor, bias: Tensor) -> Tensor:
    """conv(x) with another weight and a bias."""
    rows = convolved(as_rows(x, x), weight.flatten(1), bias) if is_product(conv, x, weight) else None
    return aten.convolution(x, weight, bias, *geometry(conv)) if rows is None else as_maps(rows, x)


def is_product(conv: Any, x: Tensor, weight: Tensor) -> bool:
    """Whether to run a convolution as a matrix product: for a few samples in a CPU's cache it is a third faster."""
    pointwise = conv.groups == 1 and set(conv.kernel_size) == {1}
    return pointwise and x.device.type in ("cpu", "meta") and x.dtype == weight.dtype == wide_dtype(x.dtype)


def as_rows(x: Tensor, like: Tensor) -> Tensor:
    """View of maps as matrices of positions by channels, one for the whole batch if `like`'s channels are innermost."""
    is_last = layout_of(like) is not torch.contiguous_format
    return x.movedim(1, -1).view(1, -1, x.shape[1]) if is_last else x.view(*x.shape[:2], -1).mT


def as_maps(rows: Tensor, like: Tensor) -> Tensor:
    """View of matrices of positions by channels as the maps that they come from."""
    return rows.view(len(like), *like.shape[2:], rows.shape[-1]).movedim(-1, 1)


def packed(x: Tensor) -> Tensor:
    """Some channels of a buffer without the gaps between them."""
    return x.contiguous(memory_format=layout_of(x))


def spans_of(x: Tensor) -> Iterator[slice]:
    limit = CPU_CHUNK if x.device.type in ("cpu", "meta") else DEVICE_CHUNK
    size = max(1, limit * len(x) // max(1, x.numel() * x.element_size()))
    return (slice(start, start + size) for start in range(0, len(x), size))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over a batch are taken in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def empty_maps(x: Tensor, channels: int, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
