"""What a net costs and how signals and gradients pass through it: numbers as plain data, the net left as it was.

`count_macs` and `summary` compute nothing: they run the net's forward on the meta device.
Hooks are removed and training flags and buffers restored on every way out, an error included; `.grad` is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map_only

from resblocks.checks import check_input_size, explained
from resblocks.landscape import loss_line as loss_line
from resblocks.landscape import loss_surface as loss_surface
from resblocks.landscape import random_direction as random_direction
from resblocks.lesions import Lesion as Lesion
from resblocks.lesions import LesionStudy as LesionStudy
from resblocks.lesions import lesion_curve as lesion_curve
from resblocks.lesions import lesion_study as lesion_study
from resblocks.lesions import path_gradients as path_gradients
from resblocks.measures import norm_of, scalar, variance_of, wide
from resblocks.residual import Residual, plain_name, residuals, some_residuals
from resblocks.shattering import gradient_correlation as gradient_correlation
from resblocks.undisturbed import INTERNAL, attributes_restored, hooked, undisturbed, unwrapped


def count_params(net: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters; a parameter that several modules share counts once, buffers do not count.

    Args:
        trainable_only: leaves out the frozen ones (`requires_grad` is False).
    """
    return sum(p.numel() for p in net.parameters() if p.requires_grad or not trainable_only)


def count_macs(net: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-accumulates of one forward pass of one sample in eval mode (1 MAC = 2 FLOP).

    Convolutions (a blur pool is one), products of matrices and attention count; normalisation, activation, other
    pooling and bias do not, as in the papers' tables, nor do products with a single vector and `nn.Bilinear`.
    torchvision's and pycls's "flops" are the same unit.

    Args:
        net: any module; the net inside `torch.compile` and data-parallel wrappers is counted.
        input_size: one sample without the batch dimension, for instance (3, 224, 224).

    Raises:
        ValueError: `input_size` is not a sequence of positive integers, or not what the net takes; the net is traced
            or scripted.
    """
    return _count_on_meta(net, input_size, {})[0]


@dataclass(frozen=True)
class SummaryRow:
    """One line of a `Summary`; shapes are without the batch dimension."""

    name: str
    type: str
    output_shape: tuple[int, ...] | None
    params: int
    macs: int
    skip: bool | None
    """Whether the shortcut is used; None for what is not a residual block."""


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: rows as data, `str()` as a table."""

    net: str
    input_size: tuple[int, ...]
    rows: tuple[SummaryRow, ...]
    params: int
    trainable_params: int
    macs: int

    def __str__(self) -> str:
        switch = {None: "", True: "on", False: "off"}
        header = ("name", "type", "output", "params", "MACs", "skip")
        body = [(r.name, r.type, _by(r.output_shape), f"{r.params:,}", _si(r.macs), switch[r.skip]) for r in self.rows]
        total = ("total", self.net, "", f"{self.params:,}", _si(self.macs), "")
        widths = [max(map(len, column)) for column in zip(header, *body, total, strict=True)]

        def line(cells: tuple[str, ...]) -> str:
            left, right = zip(cells, widths, strict=True), {3, 4}
            return "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(left)).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        note = f"input {_by(self.input_size)}, one sample, 1 MAC = 2 FLOP"
        if self.trainable_params != self.params:
            note += f", {self.trainable_params:,} parameters trainable"
        return "\n".join([line(header), rule, *map(line, body), rule, line(total), note])


def summary(net: nn.Module, input_size: Sequence[int]) -> Summary:
    """Table of a net: a row for each residual block and for each part around the blocks.

    Parts that hold blocks are opened down to the blocks; blocks stay closed. A part that the forward does not run
    has no output shape.

    Args: as `count_macs`.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 16), Residual(nn.Linear(16, 16)), nn.Linear(16, 2))
        >>> print(summary(net, (8,)))
        name   type        output  params  MACs  skip
        ---------------------------------------------
        0      Linear      16         144   128
        1      Residual    16         272   256  on
        2      Linear      2           34    32
        ---------------------------------------------
        total  Sequential             450   416
        input 8, one sample, 1 MAC = 2 FLOP
    """
    net = unwrapped(net)
    parts = dict(_parts(net))
    macs, meters = _count_on_meta(net, input_size, parts)
    rows = tuple(
        SummaryRow(
            name=name,
            type=type(part).__name__,
            output_shape=meters[name].output_shape,
            params=count_params(part),
            macs=meters[name].macs,
            skip=part.skip if isinstance(part, Residual) else None,
        )
        for name, part in parts.items()
    )
    return Summary(
        net=type(net).__name__,
        input_size=tuple(input_size),
        rows=rows,
        params=count_params(net),
        trainable_params=count_params(net, trainable_only=True),
        macs=macs,
    )


@dataclass(frozen=True)
class GradientFlow:
    """Gradient of one weight tensor."""

    name: str
    params: int
    mean_abs: float
    norm: float
    std: float


def gradient_flow(net: nn.Module) -> list[GradientFlow]:
    """Size of the gradient of every convolution and linear weight, in the order of the net; call it after `backward`.

    `mean_abs` is the mean of the absolute values, `norm` the Euclidean norm, `std` the standard deviation over the
    entries. Weights without a gradient are left out: frozen ones, and the shortcuts of blocks whose skip is off. A
    weight that is computed, by a parametrization or pruning, is told by the parameters it is made of. Weights that a
    layer of another kind holds itself, as `ECA` and `nn.MultiheadAttention` do, are not among them. Under a gradient
    scaler, unscale first.

    Raises:
        ValueError: no such weight has a gradient.
    """
    rows = gradient_sizes(net)
    if not rows:
        raise ValueError(
            f"net must have gradients on its convolution or linear weights, got {type(net).__name__} without any: "
            f"call loss.backward() first, with weights that require grad"
        )
    return rows


def gradient_sizes(net: nn.Module) -> list[GradientFlow]:
    """What `gradient_flow` gives, but nothing where nothing has a gradient."""
    rows = []
    for name, weight in _weights(unwrapped(net)):
        if weight.grad is None:
            continue
        grad = wide(weight.grad)
        mean_abs, norm, std = torch.stack([grad.abs().mean(), grad.norm(), grad.std(correction=0)]).tolist()
        rows.append(GradientFlow(plain_name(name), grad.numel(), mean_abs, norm, std))
    return rows


def _weights(net: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of convolutions and linear layers by name, or what parametrizations and hooks make them of."""
    for prefix, layer in net.named_modules():
        if isinstance(layer, (_ConvNd, nn.Linear)):
            at = "parametrizations.weight" if is_parametrized(layer, "weight") else ""
            for name, parameter in layer.get_submodule(at).named_parameters(recurse=False):
                if at or name in ("weight", "weight_orig", "weight_g", "weight_v"):
                    yield ".".join(filter(None, (prefix, at, name))), parameter


@dataclass(frozen=True)
class BlockSignal:
    """Signals of one residual block where its two paths meet.

    Variances are over all entries of a tensor. `branch_var` is of what enters the merge, so scale and drop path are
    in it. With the skip off, `shortcut_var` and `ratio` are None and `merged_var` is the variance of the branch.
    """

    name: str
    skip: bool
    shortcut_var: float | None
    branch_var: float
    merged_var: float
    merged_grad_norm: float | None
    """Euclidean norm of the loss gradient at the merged value; None without a loss or for a value without a graph."""
    branch_grad_norm: float | None
    """The same at the end of the branch, before scale and drop path."""

    @property
    def ratio(self) -> float | None:
        """Variance of the branch relative to that of the shortcut."""
        if self.shortcut_var is None:
            return None
        if self.shortcut_var == 0:
            return math.inf if self.branch_var > 0 else math.nan
        return self.branch_var / self.shortcut_var


def signal_report(net: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> list[BlockSignal]:
    """Variance of shortcut, branch and merged value of every residual block for the input `x`, in the order of the net.

    The net runs in the mode that it is in: train mode shows what training sees, batch statistics included. Buffers
    and random state are put back. A block that runs several times shows its last run; one that does not run is
    left out.

    Args:
        loss: maps the net's output to a scalar; given, one backward pass adds the gradient norms.

    Raises:
        ValueError: the net holds no `Residual`, the loss is no scalar.
    """
    blocks = some_residuals(net)
    taps = {name: _Tap(loss is not None) for name in blocks}
    with undisturbed(net, x), torch.set_grad_enabled(loss is not None):
        # Gradients are wanted at values inside the net, so a frozen net must build a graph too.
        # A copy of the leaf, which a net that begins in place may write over.
        x = x.detach().clone().requires_grad_(loss is not None and x.is_floating_point()).clone()
        with hooked(
            handle
            for name, block in blocks.items()
            for handle in (
                block.branch.register_forward_hook(taps[name].on_branch),
                block.merge.register_forward_hook(taps[name].on_merge),
            )
        ):
            out = net(x)
        ran = {name: tap for name, tap in taps.items() if tap.ran}
        if loss is not None:
            values = [value for tap in ran.values() for value in (tap.merged, tap.branch)]
            norms = iter(_grad_norms(scalar(loss(out)), values))
            for tap in ran.values():
                tap.grad_norms = (next(norms), next(norms))
    return [BlockSignal(name, blocks[name].skip, *tap.variances, *tap.grad_norms) for name, tap in ran.items()]


class _Tap:
    """What the hooks of one block saw in its last run."""

    branch: Tensor
    merged: Tensor
    variances: tuple[float | None, float, float]
    grad_norms: tuple[float | None, float | None] = (None, None)
    ran = False

    def __init__(self, for_gradients: bool) -> None:
        self.for_gradients = for_gradients

    def on_branch(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        self.branch = self.merged = y
        self.variances = (None, variance_of(y), variance_of(y))
        self.ran = True
        return self.hand_on(y)

    def on_merge(self, module: nn.Module, args: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        self.merged = y
        self.variances = (variance_of(args[0]), variance_of(args[1]), variance_of(y))
        return self.hand_on(y)

    def hand_on(self, y: Tensor) -> Tensor:
        """A copy where gradients at the value are asked for later: layers of a user may write over what they get."""
        return y.clone() if self.for_gradients else y


def _grad_norms(loss: Tensor, values: Sequence[Tensor]) -> list[float | None]:
    """Norms of the gradients of the loss, None for a value outside the graph and 0 for one that it does not use."""
    inside = [value for value in values if value.requires_grad]
    # autograd.grad instead of backward: no .grad is read or written.
    used = loss.requires_grad and bool(inside)
    norms = map(norm_of, torch.autograd.grad(loss, inside, allow_unused=True) if used else [None] * len(inside))
    return [next(norms) if value.requires_grad else None for value in values]


def _parts(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The rows of a summary: children, opened as long as they hold residual blocks without being one."""
    for name, child in net.named_children():
        if not isinstance(child, Residual) and residuals(child):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield plain_name(f"{prefix}{name}"), child


class _Meter:
    """What the hooks of one part counted: the MACs of all its runs, and the output shape of the last."""

    output_shape: tuple[int, ...] | None = None

    def __init__(self, total_flops: Callable[[], int]) -> None:
        self.total_flops, self.macs = total_flops, 0

    def before(self, module: nn.Module, args: Any) -> None:
        self.macs -= self.total_flops() // 2

    def after(self, module: nn.Module, args: Any, y: Any) -> None:
        self.macs += self.total_flops() // 2
        self.output_shape = tuple(y.shape[1:]) if isinstance(y, Tensor) else None


def _count_on_meta(
    net: nn.Module, input_size: Sequence[int], parts: dict[str, nn.Module]
) -> tuple[int, dict[str, _Meter]]:
    """MACs of one forward pass of one sample on the meta device, and a meter for each of the parts."""
    # Imported here: it costs more time than all of resblocks.
    from torch.utils.flop_counter import FlopCounterMode

    check_input_size(input_size)
    net = unwrapped(net)
    for name, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"net must be a module in Python, got a traced or scripted one, {name or 'the net itself'}"
            )
    # Copies of the tensors on the meta device stand in for the net's own: no arithmetic, no memory, no buffer written.
    # One name for a module that has several: torch would put back, by the second, the stand-in of the first.
    tensors = {
        name: tensor.detach().to("meta")
        for prefix, module in net.named_modules()
        for tensors_of in (module.named_parameters, module.named_buffers)
        for name, tensor in tensors_of(prefix, recurse=False, remove_duplicate=False)
    }
    inexact = (t.dtype for t in tensors.values() if t.is_floating_point() or t.is_complex())
    dtype = next(inexact, torch.get_default_dtype())
    x = torch.empty(1, *input_size, dtype=dtype, device="meta")
    counter = FlopCounterMode(display=False)
    meters = {name: _Meter(counter.get_total_flops) for name in parts}
    handles = (
        handle
        for name, part in parts.items()
        for handle in (
            part.register_forward_pre_hook(meters[name].before),
            part.register_forward_hook(meters[name].after),
        )
    )
    with attributes_restored(net), torch.no_grad(), hooked(handles):
        net.eval()
        for module in net.modules():
            _move_kept_to_meta(module)
        with counter, explained(net, input_size):
            torch.func.functional_call(net, tensors, (x,), tie_weights=False)
    return counter.get_total_flops() // 2, meters


def _move_kept_to_meta(module: nn.Module) -> None:
    """Tensors that a module holds beside its buffers: masks and codes that it made in an earlier forward."""
    for name, value in vars(module).items():
        if name not in INTERNAL:
            vars(module)[name] = tree_map_only(Tensor, lambda kept: kept.detach().to("meta"), value)


def _by(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))


def _si(n: int) -> str:
    """1234567890 -> "1.235 G"; below a thousand as it is."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3f} {unit}"
    return str(n)
