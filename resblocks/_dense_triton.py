"""The two elementwise passes of `resblocks.dense` as one Triton kernel each, for CUDA; `resblocks.dense` chooses.

Between them they read or write the maps of a layer 6 times, where torch's operators need 13: `activate` is the norm,
the rectifier and the cast of forward, `accumulate` the rectifier's gradient, both sums of batch norm's backward and
the addition to the gathered gradient.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from resblocks.layers import layout_of

PROGRAMS = 1024  # over positions in `accumulate`: some for each multiprocessor, and a short second stage of the sums


def activate(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """`relu(scale * x + shift)` in the given dtype, computed in that of scale, without gaps between the channels.

    Shape: x (N, C, ...), scale and shift C values in any shape; the output has the shape and layout of x.
    """
    maps = x.flatten(2)
    out = torch.empty_like(x, dtype=dtype, memory_format=layout_of(x))
    flat = out.view(*maps.shape)
    samples, channels, area = maps.shape
    rows, columns = _blocks(maps)
    grid = (triton.cdiv(samples * area, rows), triton.cdiv(channels, columns))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _activate[grid](
            maps, scale.reshape(-1), shift.reshape(-1), flat, samples * area, area, channels,
            *maps.stride(), *flat.stride(), rows, columns,
        )  # fmt: skip
    return out


def accumulate(
    dz: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Add `scale * dz` to grad where `scale * x + shift` is above zero; return the sums over those dz * xhat and dz.

    Shape: dz, x and grad (N, C, ...), the others C values in any shape; both sums are (C,).
    """
    maps, given, gathered = x.flatten(2), dz.flatten(2), grad.view(*grad.shape[:2], -1)
    samples, channels, area = maps.shape
    rows, columns = _blocks(maps)
    programs = min(PROGRAMS, triton.cdiv(samples * area, rows))
    sums = torch.empty(2, programs, channels, dtype=mean.dtype, device=x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _accumulate[(programs, triton.cdiv(channels, columns))](
            given, maps, scale.reshape(-1), shift.reshape(-1), mean, rstd, gathered, sums,
            samples * area, area, channels, programs,
            *given.stride(), *maps.stride(), *gathered.stride(), rows, columns,
        )  # fmt: skip
    dgamma, dbeta = sums.sum(1)
    return dgamma, dbeta


def _blocks(maps: Tensor) -> tuple[int, int]:
    """Positions and channels of a block: long in the direction that lies together in memory."""
    return (32, 128) if maps.stride(1) < maps.stride(2) else (256, 16)


@triton.jit  # type: ignore[untyped-decorator]
def _activate(  # type: ignore[no-untyped-def]
    x, scale, shift, out, positions, area, channels,
    x_sample, x_channel, x_position, out_sample, out_channel, out_position,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    sample, position = p // area, p % area
    inside = (p < positions)[:, None] & (c < channels)[None, :]
    a = tl.load(scale + c, mask=c < channels, other=0.0)
    b = tl.load(shift + c, mask=c < channels, other=0.0)
    value = tl.load(x + (sample * x_sample + position * x_position)[:, None] + (c * x_channel)[None, :], mask=inside)
    z = value.to(a.dtype) * a[None, :] + b[None, :]
    z = tl.where(z < 0, 0.0, z)  # a NaN stays one, unlike in a maximum
    there = out + (sample * out_sample + position * out_position)[:, None] + (c * out_channel)[None, :]
    tl.store(there, z.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _accumulate(  # type: ignore[no-untyped-def]
    dz, x, scale, shift, mean, rstd, grad, sums, positions, area, channels, programs,
    dz_sample, dz_channel, dz_position, x_sample, x_channel, x_position, grad_sample, grad_channel, grad_position,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    real = c < channels
    a = tl.load(scale + c, mask=real, other=0.0)
    b = tl.load(shift + c, mask=real, other=0.0)
    mu = tl.load(mean + c, mask=real, other=0.0)
    r = tl.load(rstd + c, mask=real, other=0.0)
    dgamma = tl.zeros([columns], dtype=mu.dtype)
    dbeta = tl.zeros([columns], dtype=mu.dtype)
    first = program.to(tl.int64) * rows + tl.arange(0, rows)
    for start in range(0, positions, programs * rows):
        p = first + start
        sample, position = p // area, p % area
        inside = (p < positions)[:, None] & real[None, :]
        value = tl.load(
            x + (sample * x_sample + position * x_position)[:, None] + (c * x_channel)[None, :], mask=inside, other=0.0
        ).to(mu.dtype)
        given = tl.load(
            dz + (sample * dz_sample + position * dz_position)[:, None] + (c * dz_channel)[None, :],
            mask=inside, other=0.0,
        ).to(mu.dtype)  # fmt: skip
        given = tl.where(value * a[None, :] + b[None, :] <= 0, 0.0, given)
        dgamma += tl.sum(given * (value - mu[None, :]), 0)
        dbeta += tl.sum(given, 0)
        there = grad + (sample * grad_sample + position * grad_position)[:, None] + (c * grad_channel)[None, :]
        before = tl.load(there, mask=inside, other=0.0)
        tl.store(there, (before.to(mu.dtype) + given * a[None, :]).to(before.dtype), mask=inside)
    tl.store(sums + program * channels + c, dgamma * r, mask=real)
    tl.store(sums + (programs + program) * channels + c, dbeta, mask=real)


@cache
def runs_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compile for that device and give the results of torch's operators."""
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    x, dz = (torch.linspace(-2, 3, 2 * 5 * 9, device=device, dtype=dtype).view(2, 5, 3, 3) * s for s in (1, -0.5))
    scale, shift, mean, rstd = (torch.linspace(low, 1, 5, device=device, dtype=wide) for low in (-1, -0.5, 0.25, 0.5))
    grad = torch.zeros_like(x)
    shape = (5, 1, 1)
    try:
        found = activate(x, scale, shift, dtype), *accumulate(dz, x, scale, shift, mean, rstd, grad), grad
    except Exception:  # of Triton, its compiler or the driver: whatever it is, torch's operators still run
        return False
    z = x.to(wide) * scale.view(shape) + shift.view(shape)
    passed = torch.where(z > 0, dz.to(wide), 0)
    xhat = (x.to(wide) - mean.view(shape)) * rstd.view(shape)
    wanted = z.relu(), (passed * xhat).sum((0, 2, 3)), passed.sum((0, 2, 3)), passed * scale.view(shape)
    near = 0.02 if wide != dtype else 1e-4
    return all(torch.allclose(a.to(wide), b, near, near) for a, b in zip(found, wanted, strict=True))
