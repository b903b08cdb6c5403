"""What a net costs and how signals and gradients pass through it: numbers as plain data, the net left as it was.

`count_params`, `count_macs` and `summary` never compute anything: they run the net's forward on the meta device.
Hooks are removed and training flags and buffers restored on every way out, an error included; `.grad` is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from resblocks.options import check_input_size
from resblocks.residual import Residual, Where, residuals, skips_off

Part: TypeAlias = Literal["branch", "skip"]


def count_params(net: nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters; a parameter that several modules share counts once, buffers do not count.

    Args:
        trainable_only: leaves out the frozen ones (`requires_grad` is False).
    """
    return sum(p.numel() for p in net.parameters() if p.requires_grad or not trainable_only)


def count_macs(net: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-accumulates of one forward pass of one sample in eval mode (1 MAC = 2 FLOP).

    Convolutions, matrix products and attention count; normalisation, activation, pooling and bias do not, as in the
    papers' tables. torchvision's and pycls's "flops" are the same unit.

    Args:
        input_size: one sample without the batch dimension, for instance (3, 224, 224).

    Raises:
        ValueError: `input_size` is not a sequence of positive integers.
    """
    return _count_on_meta(net, input_size, {})


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
    parts = dict(_parts(net))
    seen: dict[str, tuple[int, tuple[int, ...] | None]] = {}
    macs = _count_on_meta(net, input_size, parts, seen)
    rows = tuple(
        SummaryRow(
            name=name,
            type=type(part).__name__,
            output_shape=seen[name][1] if name in seen else None,
            params=count_params(part),
            macs=seen[name][0] if name in seen else 0,
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
    entries. Weights without a gradient are left out: frozen ones, and the shortcuts of blocks whose skip is off.
    Under a gradient scaler, unscale first.

    Raises:
        ValueError: no such weight has a gradient.
    """
    rows = []
    for name, layer in net.named_modules():
        weight = layer.weight if isinstance(layer, (_ConvNd, nn.Linear)) else None
        if weight is None or weight.grad is None:
            continue
        grad = _wide(weight.grad)
        mean_abs, norm, std = torch.stack([grad.abs().mean(), grad.norm(), grad.std(correction=0)]).tolist()
        rows.append(GradientFlow(f"{name}.weight".lstrip("."), grad.numel(), mean_abs, norm, std))
    if not rows:
        raise ValueError(
            f"net must have gradients on its convolution or linear weights, got {type(net).__name__} without any: "
            f"call loss.backward() first"
        )
    return rows


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
    """Euclidean norm of the loss gradient at the merged value; None without a loss."""
    branch_grad_norm: float | None
    """The same at the end of the branch, before scale and drop path."""

    @property
    def ratio(self) -> float | None:
        """Variance of the branch relative to that of the shortcut."""
        if self.shortcut_var is None:
            return None
        return self.branch_var / self.shortcut_var if self.shortcut_var > 0 else math.inf


def signal_report(net: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] | None = None) -> list[BlockSignal]:
    """Variance of shortcut, branch and merged value of every residual block for the input `x`, in the order of the net.

    The net runs in the mode that it is in: train mode shows what training sees, batch statistics included. Buffers
    and random state are put back. A block that runs several times shows its last run; one that does not run is
    left out.

    Args:
        loss: maps the net's output to a scalar; given, one backward pass adds the gradient norms.

    Raises:
        ValueError: the net holds no `Residual`.
    """
    blocks = _blocks(net)
    taps = {name: _Tap() for name in blocks}
    cuda = [x.device] if x.device.type == "cuda" else []
    with _restored(net), _eager(), torch.random.fork_rng(devices=cuda), torch.set_grad_enabled(loss is not None):
        # Gradients are wanted at values inside the net, so a frozen net must build a graph too.
        x = x.detach().requires_grad_(loss is not None and x.is_floating_point())
        with _hooks(
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
            # autograd.grad instead of backward: no .grad is read or written.
            values = [tap.merged for tap in ran.values()] + [tap.branch for tap in ran.values()]
            norms = [_norm(grad) for grad in torch.autograd.grad(loss(out), values, allow_unused=True)]
            for tap, merged, branch in zip(ran.values(), norms[: len(ran)], norms[len(ran) :], strict=True):
                tap.grad_norms = (merged, branch)
    return [BlockSignal(name, blocks[name].skip, *tap.variances, *tap.grad_norms) for name, tap in ran.items()]


class _Tap:
    """What the hooks of one block saw in its last run."""

    branch: Tensor
    merged: Tensor
    variances: tuple[float | None, float, float]
    grad_norms: tuple[float, float] | tuple[None, None] = (None, None)
    ran = False

    def on_branch(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.branch = self.merged = y
        self.variances = (None, _var(y), _var(y))
        self.ran = True

    def on_merge(self, module: nn.Module, args: tuple[Tensor, Tensor], y: Tensor) -> None:
        self.merged = y
        self.variances = (_var(args[0]), _var(args[1]), _var(y))


@dataclass(frozen=True)
class Lesion:
    """The metric of a net with one block damaged; `change` is relative to the intact net."""

    name: str
    metric: float
    change: float


@dataclass(frozen=True)
class LesionStudy:
    """What `lesion_study` returns: the metric of the intact net, and a lesion for each block."""

    intact: float
    lesions: tuple[Lesion, ...]


def lesion_study(
    net: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    part: Part = "branch",
    where: Where | None = None,
) -> LesionStudy:
    """Damage one block at a time and measure the net (Veit et al. 2016, section 4.1).

    Blocks whose skip is off have no shortcut that could take the branch's place and are left out.

    Args:
        evaluate: returns the metric of the net that it is given, which is in eval mode, with gradients off.
        part: "branch" puts zeros in the branch's place, which leaves the shortcut, as in the paper (after a `Concat`,
            zeros instead of features; after `Gated` and `WeightedAdd`, the shortcut with its weight); "skip" switches
            the shortcut off.
        where: predicate `where(name, block)`; None takes every block.

    Raises:
        ValueError: `part` is neither, no block is left to damage, or a skip cannot be switched.
    """
    if part not in get_args(Part):
        raise ValueError(f'part must be "branch" or "skip", got {part!r}')
    blocks = {name: block for name, block in _blocks(net, where).items() if block.skip}
    if not blocks:
        raise ValueError("where must choose at least one block whose skip is on, got none")
    with _restored(net), _eager(), torch.no_grad():
        net.eval()
        intact = float(evaluate(net))
        lesions = []
        for name, block in blocks.items():
            with ExitStack() as damage:
                if part == "skip":
                    damage.enter_context(skips_off(net, where=partial(_is, block)))
                else:
                    damage.enter_context(_hooks([block.branch.register_forward_hook(_zeros)]))
                metric = float(evaluate(net))
            lesions.append(Lesion(name, metric, metric - intact))
    return LesionStudy(intact, tuple(lesions))


def _is(wanted: Residual, name: str, block: Residual) -> bool:
    return block is wanted


def _zeros(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return torch.zeros_like(y)


def _blocks(net: nn.Module, where: Where | None = None) -> dict[str, Residual]:
    if not residuals(net):
        raise ValueError(f"net must hold at least one Residual, got {type(net).__name__} without any")
    return residuals(net, where)


def _wide(x: Tensor) -> Tensor:
    return x.detach() if x.dtype == torch.float64 or x.is_complex() else x.detach().float()


def _var(x: Tensor) -> float:
    return float(_wide(x).var(correction=0))


def _norm(grad: Tensor | None) -> float:
    return 0.0 if grad is None else float(_wide(grad).norm())


def _parts(net: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The rows of a summary: children, opened as long as they hold residual blocks without being one."""
    for name, child in net.named_children():
        if not isinstance(child, Residual) and residuals(child):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


@contextmanager
def _hooks(handles: Sequence[RemovableHandle] | Iterator[RemovableHandle]) -> Iterator[None]:
    """Keep hooks for a while; all of them are removed on every way out, an error while registering included."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _eager() -> AbstractContextManager[None]:
    """Run compiled nets without their graphs, which know nothing of hooks that came later."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def _restored(net: nn.Module) -> Iterator[None]:
    """Put every module's training flag and every buffer's value back on leaving."""
    training = {module: module.training for module in net.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in training
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))


def _count_on_meta(
    net: nn.Module,
    input_size: Sequence[int],
    parts: dict[str, nn.Module],
    seen: dict[str, tuple[int, tuple[int, ...] | None]] | None = None,
) -> int:
    """MACs of one forward pass of one sample on the meta device; writes (MACs, output shape) of each part to `seen`."""
    # Imported here: it costs more time than all of resblocks.
    from torch.utils.flop_counter import FlopCounterMode

    check_input_size(input_size)
    # Copies of the tensors on the meta device stand in for the net's own: no arithmetic, no memory, no buffer written.
    tensors = {
        name: tensor.detach().to("meta")
        for name, tensor in [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    }
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.get_default_dtype())
    x = torch.empty(1, *input_size, dtype=dtype, device="meta")
    counter = FlopCounterMode(display=False)
    started: dict[str, int] = {}
    seen = {} if seen is None else seen

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            started[name] = counter.get_total_flops()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Any) -> None:
            macs = (counter.get_total_flops() - started[name]) // 2
            shape = tuple(y.shape[1:]) if isinstance(y, Tensor) else None
            seen[name] = (seen.get(name, (0, None))[0] + macs, shape)

        return hook

    handles = (
        handle
        for name, part in parts.items()
        for handle in (part.register_forward_pre_hook(before(name)), part.register_forward_hook(after(name)))
    )
    with _restored(net), torch.no_grad(), _hooks(handles):
        net.eval()
        with counter:
            torch.func.functional_call(net, tensors, (x,), tie_weights=False)
    return counter.get_total_flops() // 2


def _by(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))


def _si(n: int) -> str:
    """1234567890 -> "1.235 G"; below a thousand as it is."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3f} {unit}"
    return str(n)
