"""DenseNet training in linear memory: how `DenseBlock` and `Transition` run where their layers are the paper's.

A dense block normalises the same feature maps again and again: layer l reads all maps before it through an affine of
its own, z_l = relu(gamma_l * xhat + beta_l). But xhat = (x - mean) * rstd depends on the batch alone, not on the
layer. So one buffer of raw maps, which is also the output of the block, and two numbers for each map are all that the
first norms of all layers need::

    z_l = relu(scale_l * x + shift_l)    with    scale_l = gamma_l * rstd,    shift_l = beta_l - scale_l * mean

Forward measures a map once, when it is new, and throws z_l away; backward computes it again. With dz_l, the gradient
at the input of the rectifier (zero where z_l is), backward needs for each map::

    dbeta_l = sum dz_l        dgamma_l = sum dz_l * xhat = rstd * (sum dz_l * x - mean * sum dz_l)

and batch norm's own gradient over M values is dx = scale_l * dz_l - gamma_l * rstd / M * (dbeta_l + xhat * dgamma_l).
This is linear in dz_l, so the gradients of all layers gather in one buffer G, and the correction waits until a map has
had all its readers. It needs no further pass: its sums are the parameter gradients::

    G = dOut + sum_l scale_l * dz_l        S1 = sum_l gamma_l * dbeta_l        S2 = sum_l gamma_l * dgamma_l
    dx = G - rstd / M * (S1 + xhat * S2)

What is kept for backward is the maps and, unless `memory="lean"`, the output of each 1x1 convolution: linear in the
depth, where autograd keeps all maps again for each layer. Rebuilding what is cheap is the idea of Pleiss et al. 2017
(arXiv 1707.06990); the common normalisation and the deferred correction are ours. Elementwise work and convolution go
together through a few samples at a time, so that the scratch fits a processor's cache and does not grow with the batch.
On CUDA with Triton each elementwise pass is one kernel of `resblocks._dense_triton`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from resblocks._dense_maps import (
    Affine,
    MapGradients,
    Maps,
    Part,
    activate,
    autocast_off,
    batch_moments,
    convolve,
    convolve_backward,
    convolve_with,
    empty_maps,
    rectify,
    spans_of,
    wide_dtype,
)
from resblocks._dense_plain import average, gradients_of, is_differentiated, plain_block, plain_pool
from resblocks.dense_plan import Memory, Moments, Plan, PlannedLayer, Step, geometry, may_pool, plan_block, window
from resblocks.layers import layout_of, over_positions, running_affine

aten = torch.ops.aten


def run_block(layers: Iterable[nn.Module], x: Tensor, memory: Memory) -> Tensor | None:
    """The output of a dense block, or None where its layers must be called one by one (see `plan_block`).

    In evaluation the buffer serves where no gradient is recorded.
    """
    plan = plan_block(layers, x, memory)
    if plan is None:
        return None
    if not plan.steps[0].norm.training:
        drops = any(layer.dropout for layer in plan.layers)
        return None if torch.is_grad_enabled() or drops else _evaluate(x, plan)
    params = [weight for norm, conv in plan.steps for weight in (norm.weight, norm.bias, conv.weight)]
    out: Tensor = _Block.apply(x, plan, *params)
    _count_batch(plan.moments)
    return out


def run_pool(before: Sequence[nn.Module], pool: nn.Module, x: Tensor, memory: Memory) -> Tensor | None:
    """`pool(relu(norm(x)))` that keeps x alone for backward, or None where the modules must be called one by one."""
    if not may_pool(before, pool, x, memory):
        return None
    norm: Any = before[0]
    moments: list[Moments] = []
    out: Tensor = _Pool.apply(x, norm, window(pool), moments, norm.weight, norm.bias)
    _count_batch(moments)
    return out


def _count_batch(moments: Sequence[Moments]) -> None:
    """Let the norms count their batch as their own forward would, a few calls for all of them."""
    by_factor: dict[float, list[Moments]] = {}
    tracked = [entry for entry in moments if entry.norm.track_running_stats]
    with torch.no_grad():
        counts = [norm.num_batches_tracked for norm, *_ in tracked if norm.num_batches_tracked is not None]
        if counts:
            torch._foreach_add_(counts, 1)
        for entry in tracked:
            if entry.norm.running_mean is not None:
                by_factor.setdefault(_factor(entry.norm), []).append(entry)
        for factor, entries in by_factor.items():
            means = [mean.to(norm.running_mean.dtype) for norm, mean, _, _ in entries]
            variances = [(var * (n / (n - 1))).to(norm.running_var.dtype) for norm, _, var, n in entries]
            torch._foreach_lerp_([norm.running_mean for norm, *_ in entries], means, factor)
            torch._foreach_lerp_([norm.running_var for norm, *_ in entries], variances, factor)


def _factor(norm: Any) -> float:
    """Weight of the newest batch; without momentum the plain mean over the batches, or none if nobody counts them."""
    if norm.momentum is not None:
        return float(norm.momentum)
    return 0.0 if norm.num_batches_tracked is None else 1.0 / float(norm.num_batches_tracked)


# --- a block


class _Weights(NamedTuple):
    """Of one step, in the dtypes that it is computed in, and whether the convolution's wants a gradient."""

    gamma: Tensor
    beta: Tensor
    conv: Tensor
    wanted: bool


class _Block(torch.autograd.Function):
    """The maps of a dense block from its input, its plan, and gamma, beta and weight of each step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Plan, *params: Tensor) -> Tensor:
        first, wide = x.shape[1], wide_dtype(x.dtype)
        with autocast_off(x):
            width = first + len(plan.layers) * plan.growth
            buffer = empty_maps(x, width, torch.promote_types(x.dtype, plan.compute), layout_of(x))
            # Zero stays for the last maps, which nothing in the block reads.
            mean, var, rstd = (torch.zeros(width, dtype=wide, device=x.device) for _ in range(3))
            maps, saved = Maps(buffer, mean, rstd), []
            new = slice(0, first)
            buffer[:, new] = x
            for layer, weights in zip(plan.layers, _by_layer(params, plan, wide), strict=True):
                norm = layer.steps[0].norm
                mean[new], var[new] = batch_moments(buffer[:, new])
                rstd[new] = torch.rsqrt(var[new] + norm.eps)
                plan.moments.append(Moments(norm, mean[: new.stop], var[: new.stop], x.numel() // first))
                new = slice(new.stop, new.stop + plan.growth)
                saved.append(_forward_layer(layer, weights, maps, new, plan))
        ctx.plan, ctx.counts, ctx.dtype = plan, [len(tensors) for tensors in saved], x.dtype
        ctx.save_for_backward(buffer, mean, rstd, *params, *(tensor for tensors in saved for tensor in tensors))
        return buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        buffer, mean, rstd, *rest = ctx.saved_tensors
        params, saved = rest[: 3 * len(plan.steps)], rest[3 * len(plan.steps) :]
        wanted = ctx.needs_input_grad[2:]
        if is_differentiated(grad):
            return _differentiable(ctx, grad, buffer, params, saved)
        found: list[Tensor | None] = []
        with autocast_off(grad):
            # A copy, since the gradient that comes in is autograd's.
            gradients = MapGradients(Maps(buffer, mean, rstd), torch.empty_like(buffer).copy_(grad))
            new = slice(buffer.shape[1], buffer.shape[1])
            by_layer = list(_by_layer(params, plan, mean.dtype, wanted))
            for layer, weights, count in reversed(list(zip(plan.layers, by_layer, ctx.counts, strict=True))):
                new = slice(new.start - plan.growth, new.start)
                mine, saved = saved[len(saved) - count :], saved[: len(saved) - count]
                found = _backward_layer(layer, weights, mine, gradients, new, plan) + found
            dx = gradients.finish(slice(0, new.start)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        triples = zip(found, params, wanted, strict=True)
        return dx, None, *(grad.to(p.dtype) if want and grad is not None else None for grad, p, want in triples)


def _differentiable(
    ctx: Any, grad: Tensor, buffer: Tensor, params: list[Tensor], saved: list[Tensor]
) -> tuple[Tensor | None, ...]:
    plan: Plan = ctx.plan
    ends = itertools.accumulate(ctx.counts)
    masks = [saved[end - 1] if layer.dropout else None for layer, end in zip(plan.layers, ends, strict=True)]
    with torch.enable_grad():  # a map of the output, whose gradient leads back to the input
        x = buffer[:, : buffer.shape[1] - len(plan.layers) * plan.growth]
    with autocast_off(grad):
        run = partial(plain_block, plan, masks)
        dx, *others = gradients_of(run, [x, *params], [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]], grad)
    return dx if dx is None else dx.to(ctx.dtype), None, *others


def _by_layer(
    params: Sequence[Tensor], plan: Plan, wide: torch.dtype, wanted: Sequence[bool] | None = None
) -> Iterator[list[_Weights]]:
    wanted = [False] * len(params) if wanted is None else wanted
    steps = (
        _Weights(params[at].to(wide), params[at + 1].to(wide), params[at + 2].to(plan.compute), wanted[at + 2])
        for at in range(0, len(params), 3)
    )
    return ([next(steps) for _ in layer.steps] for layer in plan.layers)


def _forward_layer(layer: PlannedLayer, weights: list[_Weights], maps: Maps, new: slice, plan: Plan) -> list[Tensor]:
    """Write the new maps; return what backward needs of this layer: [mean, rstd, kept input] of step two, [mask]."""
    x, out, saved = maps.x[:, : new.start], maps.x[:, new], []
    affine = maps.affine(weights[0].gamma, weights[0].beta)
    if len(layer.steps) == 2:
        norm = layer.steps[1].norm
        b = empty_maps(x, len(weights[1].gamma), plan.compute, layout_of(maps.x))
        convolve(x, affine, weights[0].conv, layer.steps[0].conv, b)
        mean, var = batch_moments(b)
        plan.moments.append(Moments(norm, mean, var, b.numel() // b.shape[1]))
        inner = Maps(b, mean, torch.rsqrt(var + norm.eps))
        saved += [mean, inner.rstd, b] if plan.keep else [mean, inner.rstd]
        x, affine = b, inner.affine(weights[1].gamma, weights[1].beta)
    convolve(x, affine, weights[-1].conv, layer.steps[-1].conv, out)
    if layer.dropout:
        # The mask that nn.Dropout would draw for these maps (not in channels_last_3d, which torch's convolution drops).
        noise = functional.dropout(empty_maps(x, plan.growth, plan.compute, layout_of(maps.x)).fill_(1), layer.dropout)
        out.mul_(noise)
        saved.append(noise != 0)
    return saved


def _backward_layer(
    layer: PlannedLayer, weights: list[_Weights], saved: list[Tensor], gradients: MapGradients, new: slice, plan: Plan
) -> list[Tensor | None]:
    """Hand the gradient of the new maps on to those before them; return gamma's, beta's and weight's of each step."""
    maps, dy = gradients.maps, gradients.finish(new).to(plan.compute)
    if layer.dropout:
        dy.mul_(saved.pop()).div_(1 - layer.dropout)
    gamma, beta, weight, wanted = weights[0]
    x, affine = maps.x[:, : new.start], maps.affine(gamma, beta)
    second: list[Tensor | None] = []
    if len(layer.steps) == 2:
        mean, rstd, *kept = saved
        b = kept[0] if kept else empty_maps(x, len(mean), plan.compute, layout_of(maps.x))
        if not kept:
            convolve(x, affine, weight, layer.steps[0].conv, b)
        dy, *second = _backward_second(dy, Maps(b, mean, rstd), weights[1], layer.steps[1])
    dweight = torch.zeros_like(weight, dtype=gamma.dtype) if wanted else None
    parts = convolve_backward(dy, x, affine, weight, layer.steps[0].conv, dweight)
    dgamma, dbeta = gradients.add(gamma, affine, parts)
    return [dgamma, dbeta, dweight, *second]


def _backward_second(dy: Tensor, inner: Maps, weights: _Weights, step: Step) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Through the second step, whose maps have no other reader: gradients of its input, gamma, beta and weight."""
    gamma, beta, weight, wanted = weights
    dweight = torch.zeros_like(weight, dtype=gamma.dtype) if wanted else None
    parts = convolve_backward(dy, inner.x, inner.affine(gamma, beta), weight, step.conv, dweight)
    spans = [rectify(dz, z) for _, _, dz, z in parts]
    dz = spans[0] if len(spans) == 1 else torch.cat(spans)
    del spans
    db, dgamma, dbeta = aten.native_batch_norm_backward(
        dz, inner.x, gamma, None, None, inner.mean, inner.rstd, True, step.norm.eps, [True, True, True]
    )
    return db, dgamma, dbeta, dweight


def _evaluate(x: Tensor, plan: Plan) -> Tensor:
    """The block by the running statistics, without gradients; the second norm is folded into the first convolution."""
    wide, dtype = wide_dtype(x.dtype), torch.promote_types(x.dtype, plan.compute)
    with autocast_off(x):
        buffer = empty_maps(x, x.shape[1] + len(plan.layers) * plan.growth, dtype, layout_of(x))
        new = slice(0, x.shape[1])
        buffer[:, new] = x
        for layer in plan.layers:
            old, new = slice(0, new.stop), slice(new.stop, new.stop + plan.growth)
            (norm, first), (last_norm, last) = layer.steps[0], layer.steps[-1]
            scale, shift = (over_positions(values, x) for values in running_affine(norm, wide))
            folded = None
            if first is not last:
                factor, bias = running_affine(last_norm, wide)
                folded = (first.weight.to(wide) * over_positions(factor[:, None], x)).to(plan.compute)
            for span in spans_of(buffer[:, old]):
                y = activate(buffer[span, old], scale, shift, plan.compute)
                if folded is not None:
                    y = convolve_with(y, first, folded, bias.to(plan.compute)).relu_()
                buffer[span, new] = aten.convolution(y, last.weight.to(plan.compute), None, *geometry(last))
    return buffer


# --- a transition


class _Pool(torch.autograd.Function):
    """Average over windows of relu(norm(x)): each map has one reader, the formulas above with a single layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Any, size: int, moments: list[Moments], gamma: Tensor, beta: Tensor
    ) -> Tensor:
        wide = wide_dtype(x.dtype)
        with autocast_off(x):
            mean, var = batch_moments(x)
            moments.append(Moments(norm, mean, var, x.numel() // x.shape[1]))
            maps = Maps(x, mean, torch.rsqrt(var + norm.eps))
            affine = maps.affine(gamma.to(wide), beta.to(wide))
            shape = (*x.shape[:2], *(length // size for length in x.shape[2:]))
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))
            for span in spans_of(x):
                out[span] = average(activate(x[span], *affine, x.dtype), size)
        ctx.size, ctx.eps = size, norm.eps
        ctx.save_for_backward(*maps, gamma, beta)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, gamma, beta = ctx.saved_tensors
        if is_differentiated(grad):
            wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
            with autocast_off(x):
                dx, *others = gradients_of(partial(plain_pool, ctx.eps, ctx.size), [x, gamma, beta], wanted, grad)
            return dx, None, None, None, *others
        with autocast_off(x):
            maps = Maps(x, mean, rstd)
            gradients = MapGradients(maps, torch.zeros_like(x, memory_format=layout_of(x)))
            wide = gamma.to(mean.dtype)
            affine = maps.affine(wide, beta.to(mean.dtype))
            dgamma, dbeta = gradients.add(wide, affine, _pool_backward(grad, x, affine, ctx.size))
            for span in spans_of(x):
                gradients.grad[span] = gradients.finish(slice(None), span)
        return gradients.grad, None, None, None, dgamma.to(gamma.dtype), dbeta.to(beta.dtype)


def _pool_backward(grad: Tensor, x: Tensor, affine: Affine, size: int) -> Iterator[Part]:
    covered = (slice(None), slice(None), *(slice(length * size) for length in grad.shape[2:]))
    for span in spans_of(x):
        part = x[span]
        z = activate(part, *affine, x.dtype)
        dz = torch.zeros_like(z)
        spread = functional.interpolate(grad[span], scale_factor=size, mode="nearest-exact")  # "nearest" rounds wrongly
        dz[covered] = spread.div_(size ** (x.dim() - 2))
        yield span, part, dz, z
