"""DenseNet training in linear memory: how `DenseBlock` and `Transition` run where their layers are the paper's.

A dense block normalises the same feature maps again and again: layer l reads all maps before it through an affine of
its own, z_l = relu(gamma_l * xhat + beta_l). But xhat = (x - mean) * rstd depends on the batch alone, not on the
layer. So one buffer of raw maps, which is also the output of the block, and two numbers for each map are all that the
first norms of all layers need:

    z_l = relu(scale_l * x + shift_l)    with    scale_l = gamma_l * rstd,    shift_l = beta_l - scale_l * mean

Forward measures a map once, when it is new, and throws z_l away; backward computes it again. With dz_l, the gradient
at the input of the rectifier (zero where z_l is), backward needs for each map

    dbeta_l = sum dz_l        dgamma_l = sum dz_l * xhat = rstd * (sum dz_l * x - mean * sum dz_l)

and batch norm's own gradient over M values is dx = scale_l * dz_l - gamma_l * rstd / M * (dbeta_l + xhat * dgamma_l).
This is linear in dz_l, so the gradients of all layers gather in one buffer G, and the correction waits until a map has
had all its readers. It needs no further pass: its sums are the parameter gradients.

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
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from resblocks._dense_plain import average, gradients_of, is_differentiated, plain_block, plain_pool
from resblocks.dense_plan import Memory, Moments, Plan, PlannedLayer, Step, geometry, may_pool, plan_block, window
from resblocks.layers import layout_of, over_positions, running_affine

aten = torch.ops.aten

# Bytes of one chunk of samples. 2 MiB is where the time is flat on a CPU with 0.5 MiB of second-level cache; on an
# accelerator, where few large kernels are best, the number only bounds the scratch.
CPU_CHUNK, DEVICE_CHUNK = 2**21, 2**29


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
        first, wide = x.shape[1], _wide(x.dtype)
        with _autocast_off(x):
            width = first + len(plan.layers) * plan.growth
            buffer = _empty(x, width, torch.promote_types(x.dtype, plan.compute), layout_of(x))
            # Zero stays for the last maps, which nothing in the block reads.
            mean, var, rstd = (torch.zeros(width, dtype=wide, device=x.device) for _ in range(3))
            maps, saved = _Maps(buffer, mean, rstd), []
            new = slice(0, first)
            buffer[:, new] = x
            for layer, weights in zip(plan.layers, _by_layer(params, plan, wide), strict=True):
                norm = layer.steps[0].norm
                mean[new], var[new] = _batch_moments(buffer[:, new])
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
        with _autocast_off(grad):
            # A copy, since the gradient that comes in is autograd's.
            gradients = _MapGradients(_Maps(buffer, mean, rstd), torch.empty_like(buffer).copy_(grad))
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
    with _autocast_off(grad):
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


def _forward_layer(layer: PlannedLayer, weights: list[_Weights], maps: _Maps, new: slice, plan: Plan) -> list[Tensor]:
    """Write the new maps; return what backward needs of this layer: [mean, rstd, kept input] of step two, [mask]."""
    x, out, saved = maps.x[:, : new.start], maps.x[:, new], []
    affine = maps.affine(weights[0].gamma, weights[0].beta)
    if len(layer.steps) == 2:
        norm = layer.steps[1].norm
        b = _empty(x, len(weights[1].gamma), plan.compute, layout_of(maps.x))
        _convolve(x, affine, weights[0].conv, layer.steps[0].conv, b)
        mean, var = _batch_moments(b)
        plan.moments.append(Moments(norm, mean, var, b.numel() // b.shape[1]))
        inner = _Maps(b, mean, torch.rsqrt(var + norm.eps))
        saved += [mean, inner.rstd, b] if plan.keep else [mean, inner.rstd]
        x, affine = b, inner.affine(weights[1].gamma, weights[1].beta)
    _convolve(x, affine, weights[-1].conv, layer.steps[-1].conv, out)
    if layer.dropout:
        # The mask that nn.Dropout would draw for these maps (not in channels_last_3d, which torch's convolution drops).
        noise = functional.dropout(_empty(x, plan.growth, plan.compute, layout_of(maps.x)).fill_(1), layer.dropout)
        out.mul_(noise)
        saved.append(noise != 0)
    return saved


def _backward_layer(
    layer: PlannedLayer, weights: list[_Weights], saved: list[Tensor], gradients: _MapGradients, new: slice, plan: Plan
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
        b = kept[0] if kept else _empty(x, len(mean), plan.compute, layout_of(maps.x))
        if not kept:
            _convolve(x, affine, weight, layer.steps[0].conv, b)
        dy, *second = _backward_second(dy, _Maps(b, mean, rstd), weights[1], layer.steps[1])
    dweight = torch.zeros_like(weight, dtype=gamma.dtype) if wanted else None
    parts = _convolve_backward(dy, x, affine, weight, layer.steps[0].conv, dweight)
    dgamma, dbeta = gradients.add(gamma, affine, parts)
    return [dgamma, dbeta, dweight, *second]


def _backward_second(dy: Tensor, inner: _Maps, weights: _Weights, step: Step) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Through the second step, whose maps have no other reader: gradients of its input, gamma, beta and weight."""
    gamma, beta, weight, wanted = weights
    dweight = torch.zeros_like(weight, dtype=gamma.dtype) if wanted else None
    parts = _convolve_backward(dy, inner.x, inner.affine(gamma, beta), weight, step.conv, dweight)
    spans = [_rectify(dz, z) for _, _, dz, z in parts]
    dz = spans[0] if len(spans) == 1 else torch.cat(spans)
    del spans
    db, dgamma, dbeta = aten.native_batch_norm_backward(
        dz, inner.x, gamma, None, None, inner.mean, inner.rstd, True, step.norm.eps, [True, True, True]
    )
    return db, dgamma, dbeta, dweight


def _evaluate(x: Tensor, plan: Plan) -> Tensor:
    """The block by the running statistics, without gradients; the second norm is folded into the first convolution."""
    wide, dtype = _wide(x.dtype), torch.promote_types(x.dtype, plan.compute)
    with _autocast_off(x):
        buffer = _empty(x, x.shape[1] + len(plan.layers) * plan.growth, dtype, layout_of(x))
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
            for span in _spans(buffer[:, old]):
                y = _activate(buffer[span, old], scale, shift, plan.compute)
                if folded is not None:
                    y = aten.convolution(y, folded, bias.to(plan.compute), *geometry(first)).relu_()
                buffer[span, new] = aten.convolution(y, last.weight.to(plan.compute), None, *geometry(last))
    return buffer


# --- a transition


class _Pool(torch.autograd.Function):
    """Average over windows of relu(norm(x)): each map has one reader, the formulas above with a single layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Any, size: int, moments: list[Moments], gamma: Tensor, beta: Tensor
    ) -> Tensor:
        wide = _wide(x.dtype)
        with _autocast_off(x):
            mean, var = _batch_moments(x)
            moments.append(Moments(norm, mean, var, x.numel() // x.shape[1]))
            maps = _Maps(x, mean, torch.rsqrt(var + norm.eps))
            affine = maps.affine(gamma.to(wide), beta.to(wide))
            shape = (*x.shape[:2], *(length // size for length in x.shape[2:]))
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))
            for span in _spans(x):
                out[span] = average(_activate(x[span], *affine, x.dtype), size)
        ctx.size, ctx.eps = size, norm.eps
        ctx.save_for_backward(*maps, gamma, beta)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, gamma, beta = ctx.saved_tensors
        if is_differentiated(grad):
            wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
            with _autocast_off(x):
                dx, *others = gradients_of(partial(plain_pool, ctx.eps, ctx.size), [x, gamma, beta], wanted, grad)
            return dx, None, None, None, *others
        with _autocast_off(x):
            maps = _Maps(x, mean, rstd)
            gradients = _MapGradients(maps, torch.zeros_like(x, memory_format=layout_of(x)))
            wide = gamma.to(mean.dtype)
            affine = maps.affine(wide, beta.to(mean.dtype))
            dgamma, dbeta = gradients.add(wide, affine, _pool_backward(grad, x, affine, ctx.size))
            for span in _spans(x):
                gradients.grad[span] = gradients.finish(slice(None), span)
        return gradients.grad, None, None, None, dgamma.to(gamma.dtype), dbeta.to(beta.dtype)


def _pool_backward(grad: Tensor, x: Tensor, affine: _Affine, size: int) -> Iterator[_Part]:
    covered = (slice(None), slice(None), *(slice(length * size) for length in grad.shape[2:]))
    for span in _spans(x):
        part = x[span]
        z = _activate(part, *affine, x.dtype)
        dz = torch.zeros_like(z)
        spread = functional.interpolate(grad[span], scale_factor=size, mode="nearest-exact")  # "nearest" rounds wrongly
        dz[covered] = spread.div_(size ** (x.dim() - 2))
        yield span, part, dz, z


# --- what both are made of: maps and their gradients, convolution behind norm and rectifier

_Affine = tuple[Tensor, Tensor]  # scale and shift, with a dimension for each of the positions'
# A span of the samples; what a norm reads there; the gradient behind the rectifier, and what the rectifier put out.
_Part = tuple[slice, Tensor, Tensor, Tensor]


class _Maps(NamedTuple):
    """Raw maps with the mean and rstd of each over the batch."""

    x: Tensor
    mean: Tensor
    rstd: Tensor

    def affine(self, gamma: Tensor, beta: Tensor) -> _Affine:
        """Scale and shift of a norm that reads the first maps."""
        scale = gamma * self.rstd[: len(gamma)]
        shift = beta - scale * self.mean[: len(gamma)]
        return over_positions(scale, self.x), over_positions(shift, self.x)


class _MapGradients:
    """The gradients of maps: G, S1 and S2 of the formulas above."""

    def __init__(self, maps: _Maps, grad: Tensor) -> None:
        self.maps, self.grad = maps, grad
        self.s1, self.s2 = torch.zeros_like(maps.mean), torch.zeros_like(maps.mean)

    def add(self, gamma: Tensor, affine: _Affine, parts: Iterable[_Part]) -> tuple[Tensor, Tensor]:
        """Add what a reader of the first maps hands back, span by span; return its dgamma and dbeta."""
        c, kernels = len(gamma), _kernels(self.grad)
        grad, mean, rstd = self.grad[:, :c], self.maps.mean[:c], self.maps.rstd[:c]
        dgamma, dbeta = torch.zeros_like(mean), torch.zeros_like(mean)
        for span, x, dz, z in parts:
            if kernels is not None:
                more = kernels.accumulate(dz, x, *affine, mean, rstd, grad[span])
            else:
                # Batch norm's own backward takes both sums in one pass, and does not cancel between x and mean.
                dz, given = _rectify(dz, z).to(x.dtype), (mean, rstd**-2, None, None)
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
        return _linear(x, over_positions(slope, x), over_positions(offset, x)).add_(self.grad[span, which])


def _batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, in at least float32."""
    wide = _wide(x.dtype)
    if x.device.type == "cpu":  # torch.var_mean is 4 to 25 times slower there
        narrow = _packed(x) if x.dtype != wide else x  # its fast path for them wants no gaps
        unused = x.new_zeros((2, x.shape[1]), dtype=wide)  # running statistics, which say what dtype to sum in
        mean, var = aten.batch_norm_update_stats(narrow, *unused, 0.0)
    else:
        var, mean = torch.var_mean(x.to(wide), [0, *range(2, x.dim())], correction=0)
    return mean, var


def _linear(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale * x + shift, in the dtype of scale and shift."""
    if x.device.type == "cpu" and x.stride(-1) == 1:
        return (x * scale).add_(shift)  # addcmul is not vectorised there
    return torch.addcmul(shift, x, scale)


def _kernels(x: Tensor) -> Any:
    """The module of Triton's kernels where they run and are right, else None."""
    return _find_kernels(x.device, x.dtype) if x.is_cuda else None


@cache
def _find_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    try:
        from resblocks import _dense_triton
    except ImportError:
        return None
    return _dense_triton if _dense_triton.runs_right(device, dtype) else None


def _activate(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    if (kernels := _kernels(x)) is not None:
        found: Tensor = kernels.activate(x, scale, shift, dtype)
        return found
    if x.device.type == "cpu" and x.dtype == dtype == torch.bfloat16:
        return _activate_narrow(_packed(x), scale.flatten(), shift.flatten())
    return _linear(x, scale, shift).relu_().to(dtype)


def _activate_narrow(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The same in bfloat16 on a CPU, where batch norm's forward is the fast way to round once, from float32."""
    z: Tensor = aten.native_batch_norm(x, scale, shift, torch.zeros_like(scale), torch.ones_like(scale), False, 0, 0)[0]
    # relu_ takes five times as long as integers, which know the sign of all but NaN. A NaN of the norm shows in shift;
    # one of x is in the output of the block, too.
    return z.view(torch.int16).clamp_(min=0).view(x.dtype) if math.isfinite(shift.sum().item()) else z.relu_()


def _rectify(dz: Tensor, z: Tensor) -> Tensor:
    """dz, in place, where z is above zero."""
    out: Tensor = aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)
    return out


def _convolve(x: Tensor, affine: _Affine, weight: Tensor, conv: Any, out: Tensor) -> None:
    """out = conv(relu(scale * x + shift))."""
    product = _is_product(conv, x, weight)
    for span in _spans(x):
        z = _activate(x[span], *affine, weight.dtype)
        if product:
            rows = _rows(z, x)
            torch.bmm(rows, weight.flatten(1).mT.expand(len(rows), -1, -1), out=_rows(out[span], x))
        else:
            out[span] = aten.convolution(z, weight, None, *geometry(conv))


def _convolve_backward(
    dy: Tensor, x: Tensor, affine: _Affine, weight: Tensor, conv: Any, dweight: Tensor | None
) -> Iterator[_Part]:
    """The gradient behind the rectifier of `_convolve`, span by span; adds the weight's to dweight."""
    product = _is_product(conv, x, weight)
    for span in _spans(x):
        part = _packed(x[span])
        z = _activate(part, *affine, weight.dtype)
        if product:
            dz, rows = torch.empty_like(z), _rows(dy[span], x)
            torch.bmm(rows, weight.flatten(1).expand(len(rows), -1, -1), out=_rows(dz, x))
            if dweight is not None:
                dweight.flatten(1).addbmm_(rows.mT, _rows(z, x))
        else:
            wanted = [True, dweight is not None, False]
            dz, more, _ = aten.convolution_backward(dy[span], z, weight, None, *geometry(conv), wanted)
            if dweight is not None:
                dweight.add_(more)
        yield span, part, dz, z


def _is_product(conv: Any, x: Tensor, weight: Tensor) -> bool:
    """Whether to run a convolution as a matrix product: for a few samples in a CPU's cache it is a third faster."""
    pointwise = conv.groups == 1 and set(conv.kernel_size) == {1}
    return pointwise and x.device.type in ("cpu", "meta") and x.dtype == weight.dtype == _wide(x.dtype)


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """View of maps as matrices of positions by channels, one for the whole batch if `like`'s channels are innermost."""
    is_last = layout_of(like) is not torch.contiguous_format
    return x.movedim(1, -1).view(1, -1, x.shape[1]) if is_last else x.view(*x.shape[:2], -1).mT


def _packed(x: Tensor) -> Tensor:
    """Some channels of a buffer without the gaps between them."""
    return x.contiguous(memory_format=layout_of(x))


def _spans(x: Tensor) -> Iterator[slice]:
    limit = CPU_CHUNK if x.device.type in ("cpu", "meta") else DEVICE_CHUNK
    size = max(1, limit * len(x) // max(1, x.numel() * x.element_size()))
    return (slice(start, start + size) for start in range(0, len(x), size))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over a batch are taken in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _empty(x: Tensor, channels: int, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)


def _autocast_off(x: Tensor) -> AbstractContextManager[object]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
