"""Where `resblocks.dense` may run a dense block or a transition: what the modules say, and whether anybody watches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resblocks.layers import avg_pool, batch_norm, convolution
from resblocks.residual import Concat, Residual, keeps_forward
from resblocks.watched import is_plain, may_replace

Memory: TypeAlias = Literal["shared", "lean", "plain"]


class Step(NamedTuple):
    """Norm, ReLU, convolution."""

    norm: Any
    conv: Any


class PlannedLayer(NamedTuple):
    """A dense layer: one step, or two with the 1x1 convolution first; the probability of its dropout."""

    steps: list[Step]
    dropout: float


class Moments(NamedTuple):
    """A norm with the mean, the biased variance and the number of values of its batch."""

    norm: Any
    mean: Tensor
    var: Tensor
    values: int


@dataclass
class Plan:
    """How to run a block: its layers, whether to keep what the first of two steps puts out, what convolutions read.

    `moments` is what forward leaves behind for the running statistics.
    """

    layers: list[PlannedLayer]
    keep: bool
    compute: torch.dtype
    moments: list[Moments] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        return [step for layer in self.layers for step in layer.steps]

    @property
    def growth(self) -> int:
        return int(self.layers[-1].steps[-1].conv.out_channels)


def check_memory(memory: str) -> None:
    """Raise unless the mode of a dense block or transition exists."""
    if memory not in get_args(Memory):
        raise ValueError(f"memory must be one of {', '.join(get_args(Memory))}, got {memory!r}")


def plan_block(layers: Iterable[nn.Module], x: Tensor, memory: Memory) -> Plan | None:
    """How to run a dense block on x, or None where its layers must be called one by one.

    That is where somebody watches or changes them (hooks, tracing, compilation, function transforms), and where one
    is not batch norm, ReLU, convolution without bias, merged by concatenation. The norms are all in one mode.
    """
    layers = list(layers)
    if memory == "plain" or not may_replace(layers, x):
        return None
    found = [read for layer in layers if (read := _read_layer(layer, x.dim() - 2)) is not None]
    plan = Plan(found, memory == "shared" and torch.is_grad_enabled(), compute_dtype(x))
    norms = [step.norm for step in plan.steps]
    if not found or len(found) < len(layers) or not _fit(norms, x):
        return None
    if len(set(norms)) < len(norms):
        return None  # one that serves twice counts between its uses
    firsts = [layer.steps[0].norm for layer in found]
    channels = [x.shape[1] + number * plan.growth for number in range(len(found))]
    if [norm.num_features for norm in firsts] != channels or len({norm.eps for norm in firsts}) > 1:
        return None  # a map has one rstd for all its readers
    if any(layer.steps[-1].conv.out_channels != plan.growth for layer in found):
        return None
    return plan if all(step.conv.weight.dtype == x.dtype or _is_cast(x) for step in plan.steps) else None


def may_pool(before: Sequence[nn.Module], pool: nn.Module, x: Tensor, memory: Memory) -> bool:
    """Whether `pool(relu(norm(x)))` can be run as one; `before` are norm and ReLU."""
    if memory == "plain" or not may_replace([*before, pool], x) or len(before) != 2:
        return False
    (norm, act), dims = before, x.dim() - 2
    if not _is_norm(norm, dims) or type(act) is not nn.ReLU or type(pool) is not avg_pool[dims - 1]:
        return False
    return 0 < window(pool) <= min(x.shape[2:]) and _fit([norm], x) and norm.training


def pool_commutes(conv: nn.Module, pool: nn.Module) -> bool:
    """Whether an average pool may run before a convolution: one works within maps, the other within positions."""
    if not isinstance(conv, _ConvNd) or {*conv.kernel_size, *conv.stride, 1} != {1} or any(_tuple(conv.padding)):
        return False
    return type(pool) in avg_pool and window(pool) > 0


def window(pool: Any) -> int:
    """Size of the windows of an average pool that lie side by side, 0 for one of another kind."""
    sizes = {*_tuple(pool.kernel_size), *_tuple(pool.stride)}
    plain = not any(_tuple(pool.padding)) and not pool.ceil_mode and not getattr(pool, "divisor_override", None)
    return int(sizes.pop()) if plain and len(sizes) == 1 else 0


def geometry(conv: Any) -> tuple[object, ...]:
    """What the operator of a convolution takes behind its bias."""
    return conv.stride, conv.padding, conv.dilation, False, (0,) * len(conv.stride), conv.groups


def compute_dtype(x: Tensor) -> torch.dtype:
    """What convolutions read."""
    return torch.get_autocast_dtype(x.device.type) if _is_cast(x) else x.dtype


def _is_cast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64


def _tuple(size: Any) -> tuple[Any, ...]:
    return size if isinstance(size, tuple) else (size,)


def dense_branch(layer: nn.Module) -> nn.Sequential | None:
    """The branch of a layer that puts what the branch makes beside its input and does nothing else, or None."""
    if not isinstance(layer, Residual) or not keeps_forward(layer) or not layer.skip:
        return None
    around = (layer.preact, layer.shortcut, layer.scale, layer.drop_path, layer.act)
    if type(layer.merge) is not Concat or any(type(part) is not nn.Identity for part in around):
        return None
    return layer.branch if type(layer.branch) is nn.Sequential else None


def _read_layer(layer: nn.Module, dims: int) -> PlannedLayer | None:
    branch = dense_branch(layer)
    if branch is None or layer.checkpoint:
        return None
    modules = list(branch)
    dropout = modules.pop() if modules and type(modules[-1]) is nn.Dropout else None
    if isinstance(dropout, nn.Dropout) and dropout.p == 1:
        return None
    if len(modules) not in (3, 6) or any(type(act) is not nn.ReLU for act in modules[1::3]):
        return None
    steps = [Step(norm, conv) for norm, conv in zip(modules[::3], modules[2::3], strict=True)]
    if not all(_is_norm(step.norm, dims) and _is_conv(step.conv, dims) for step in steps):
        return None
    return PlannedLayer(steps, float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0)


def _is_norm(norm: Any, dims: int) -> bool:
    return 1 <= dims <= 3 and type(norm) is batch_norm[dims - 1] and is_plain(norm.weight) and is_plain(norm.bias)


def _is_conv(conv: Any, dims: int) -> bool:
    if type(conv) is not convolution[dims - 1] or conv.bias is not None or not is_plain(conv.weight):
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    sizes = zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
    return all(stride == 1 and 2 * pad == dilation * (kernel - 1) for kernel, stride, pad, dilation in sizes)


def _fit(norms: Sequence[Any], x: Tensor) -> bool:
    """Whether the norms are all in one mode, in which they take x."""
    training = norms[0].training
    if any(norm.training is not training or norm.weight.dtype not in (x.dtype, torch.float32) for norm in norms):
        return False
    return x.numel() > x.shape[1] if training else all(norm.running_mean is not None for norm in norms)
