"""The one idea of the library: `y = act(merge(shortcut(h), branch(h)))` with `h = preact(x)`, and its skip switch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resblocks.chain import activate, ends_fresh, is_silent, run_layers
from resblocks.checks import check_flag
from resblocks.init import Draw, init_weights
from resblocks.rebuild import has_pair, start_rebuild
from resblocks.recompute import recompute
from resblocks.undisturbed import unwrapped
from resblocks.watched import is_traced, is_watched

Checkpoint: TypeAlias = bool | Literal["norms"]
Where: TypeAlias = str | Callable[[str, "Residual"], bool]


@torch.fx.wrap
def fitting(branch: Tensor, shortcut: Tensor) -> Tensor:
    """The branch, if it has the shape of the shortcut; torch would broadcast size-1 dimensions without a word."""
    if shortcut.shape != branch.shape:
        raise ValueError(
            f"shortcut and branch must have the same shape to be added, "
            f"got shortcut {tuple(shortcut.shape)} and branch {tuple(branch.shape)}"
        )
    return branch


class Add(nn.Module):
    """Sum of shortcut and branch (He et al. 2015, fig. 2), a module so that hooks and quantisation see it.

    Shape: two tensors of one shape -> that shape.

    Raises:
        ValueError: in forward, when the shapes differ.
    """

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return shortcut + fitting(branch, shortcut)


class Concat(nn.Module):
    """Shortcut and branch side by side in the channel dimension (Huang et al. 2017, eq. 2).

    Shape: (N, C1, ...), (N, C2, ...) -> (N, C1 + C2, ...).
    """

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return torch.cat([shortcut, branch], 1)


class Residual(nn.Module):
    """Any branch with a shortcut around it: `y = act(merge(shortcut(h), drop_path(scale(branch(h)))))`.

    Here `h = preact(x)`. Every part is a named child, so hooks, lesions and diagnostics reach it; an absent part is
    `nn.Identity`. With the skip off the block is `y = act(branch(h))`: scale and drop path belong to the merge, and
    without a shortcut a scale of zero or a dropped branch would leave nothing.

    Args:
        branch: F(x), the layers that learn; any module of one tensor, another `Residual` included.
        shortcut: what goes around the branch; None is the identity.
        preact: what branch and shortcut both read (He et al. 2016, the first activation of a projecting unit).
        merge: joins shortcut and branch, in this order; None is `Add`.
        act: applied to the merged result (He et al. 2015).
        scale: applied to the branch before the merge (`ZeroInit`, `SkipInit`, `ReZero`, `LayerScale`, `Fixup`); one
            with a method `start_branch(branch)` also sets what the branch starts with.
        drop_path: stochastic depth, applied to the scaled branch.
        checkpoint: what is kept for backward; results are the same. False keeps all. True keeps the input and runs the
            block again in backward (`resblocks.recompute`): hooks on the parts run twice, and meanwhile no other
            thread may run, switch or save the block. "norms" keeps what norms read and rebuilds what they and the
            activations behind them put out (`resblocks.rebuild`): hooks run once, and what they look at is kept; under
            torch.compile and within another checkpoint it changes nothing.
        skip: False drops the shortcut for good and builds a plain block.

    Shape: that of the parts; with the defaults the branch must keep the shape of its input.

    Raises:
        ValueError: a part that is no module; `skip=False` together with a shortcut, merge, drop path or scale (a plain
            block that starts at zero puts out zeros for ever, since its weights get no gradient); a part that begins
            with a layer that works in place, and would write over what others or hooks read; another `checkpoint`, or
            "norms" where no norm has an activation behind it; `skip` that is no bool.

    Example:
        >>> block = Residual(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
        >>> block(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        *,
        preact: nn.Module | None = None,
        merge: nn.Module | None = None,
        act: nn.Module | None = None,
        scale: nn.Module | None = None,
        drop_path: nn.Module | None = None,
        checkpoint: Checkpoint = False,
        skip: bool = True,
    ) -> None:
        super().__init__()
        check_checkpoint(checkpoint)
        check_flag(skip=skip)
        at_the_merge = {"shortcut": shortcut, "scale": scale, "drop_path": drop_path, "merge": merge}
        check_parts({"branch": branch, "preact": preact, "act": act, **at_the_merge})
        for name, part in at_the_merge.items():
            if part is not None and not skip:
                raise ValueError(f"{name} must be None with skip=False, which leaves nothing to merge, got {part}")
        self.preact = identity_if_none(preact)
        self.branch = branch
        self.shortcut = identity_if_none(shortcut) if skip else None
        self._skip = skip
        self.scale = identity_if_none(scale)
        self.drop_path = identity_if_none(drop_path)
        self.merge = merge if merge is not None else Add()
        self.act = identity_if_none(act)
        if checkpoint == "norms" and not has_pair(self.preact, branch):
            raise ValueError(
                f"checkpoint='norms' needs a norm and an activation behind it that it can run a second time "
                f"(resblocks.rebuild.can_rebuild) in branch or preact, got {self}"
            )
        self.checkpoint = checkpoint
        self.start_weights()

    def start_weights(self) -> None:
        """Set what the branch starts with beyond the draw of its layers."""
        start = getattr(self.scale, "start_branch", None)
        if callable(start):
            start(self.branch)

    def init_weights(self, draw: Draw | None = None) -> None:
        """Draw all weights anew, by your own rule or after `to_empty`; see `resblocks.init_weights`."""
        init_weights(self, draw)

    @property
    def skip(self) -> bool:
        """Whether the shortcut is used; set it to switch at run time."""
        return self._skip

    @skip.setter
    def skip(self, on: bool) -> None:
        check_switch(self, on)
        self._skip = on

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpoint in (False, "norms") or not torch.is_grad_enabled():
            return self.run(x)
        return recompute(self, self.run, x)

    def run(self, x: Tensor) -> Tensor:
        """The block itself, once."""
        if not is_traced(x):
            return self._run_unseen(x)
        h = self.preact(x)
        y = self.branch(h)
        if self._skip:
            assert self.shortcut is not None  # the setter keeps it so
            y = self.merge(self.shortcut(h), self.drop_path(self.scale(y)))
        out: Tensor = self.act(y)
        return out

    def _run_unseen(self, x: Tensor) -> Tensor:
        """The same sentence, where only hooks of the parts can look on: what nobody sees is written over."""
        rebuild = start_rebuild() if self.checkpoint == "norms" and torch.is_grad_enabled() else None
        parts: Any = self._modules  # a module's attributes are slow to find
        branch = parts["branch"]
        h = run_layers(parts["preact"], x, rebuild)
        y = run_layers(branch, h, rebuild)
        if not isinstance(y, Tensor):
            raise ValueError(f"branch must put out one tensor, got {type(y).__name__} from {type(branch).__name__}")
        owned = ends_fresh(branch)
        if self._skip:
            unseen = type(parts["merge"]) is Add and not is_watched(parts["merge"])
            y = self._join(run_layers(parts["shortcut"], h, rebuild), y, in_place=owned and unseen)
            owned = unseen
        return y if is_silent(parts["act"]) else activate(parts["act"], y, owned=owned)

    def _join(self, shortcut: Tensor, y: Tensor, *, in_place: bool) -> Tensor:
        parts: Any = self._modules
        scale, drop_path = parts["scale"], parts["drop_path"]
        silent = is_silent(scale) and is_silent(drop_path)
        alike = (shortcut.shape, shortcut.dtype, shortcut.stride()) == (y.shape, y.dtype, y.stride())
        if in_place and silent and alike:
            return y.add_(shortcut)
        out: Tensor = parts["merge"](shortcut, y if silent else drop_path(scale(y)))
        return out

    def __repr__(self) -> str:
        """The block on one line; `nn.Module.__repr__(block)` shows every layer on its own."""
        parts = [f"{name}: {in_words(part)}" for name, part in self.named_children() if not is_usual(part)]
        return f"{type(self).__name__}({'; '.join(parts if self._skip else [*parts, 'skip=False'])})"


# What returns its input itself in evaluation.
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
PASSES_ON = (nn.Identity, *DROPOUTS)
VIEWS = (nn.Flatten, nn.Unflatten)


def writes_over_input(part: nn.Module) -> nn.Module | None:
    """The layer of a part that would change the input of the part, if there is one."""
    for layer in part.modules():  # in the order in which they run, as far as the first that puts out a new tensor
        if getattr(layer, "inplace", False):
            return layer
        if not isinstance(layer, nn.Sequential) and type(layer) not in (*PASSES_ON, *VIEWS):
            return None
    return None


def keeps_forward(block: Residual) -> bool:
    """Whether no subclass has changed what a block does."""
    return (type(block).forward, type(block).run) == (Residual.forward, Residual.run)


def in_words(layer: nn.Module) -> str:
    """A layer, or a sequence of them, in the few words that tell it from its like."""
    if isinstance(layer, nn.Sequential):
        return ", ".join(in_words(child) for child in layer)
    if isinstance(layer, _ConvNd):
        size = "x".join(map(str, layer.kernel_size))
        each = "x".join(map(str, dict.fromkeys(layer.stride) if len(set(layer.stride)) == 1 else layer.stride))
        stride = "" if each == "1" else f" / {each}"
        groups = "" if layer.groups == 1 else f" in {layer.groups} groups"
        return f"{size} {layer.in_channels}-{layer.out_channels}{stride}{groups}"
    return type(layer).__name__


def is_usual(part: nn.Module) -> bool:
    """Whether a part does what it does in every block by default, and needs no mention."""
    return type(part) in (nn.Identity, Add)


def identity_if_none(module: nn.Module | None) -> nn.Module:
    """The module, or `nn.Identity` for None; never by truth value, since an empty `nn.Sequential` is falsy."""
    return nn.Identity() if module is None else module


def check_parts(parts: dict[str, nn.Module | None]) -> None:
    """Raise unless the parts are modules that do not begin in place, or, all but the branch, None."""
    for name, part in parts.items():
        if part is None and name != "branch":
            continue
        if not isinstance(part, nn.Module):
            raise ValueError(f"{name} must be a torch.nn.Module{'' if name == 'branch' else ' or None'}, got {part!r}")
        if name not in ("drop_path", "merge") and (layer := writes_over_input(part)) is not None:
            raise ValueError(f"{name} must not begin in place, as others or hooks read its input, got {layer}")


def check_checkpoint(checkpoint: object) -> None:
    """Raise unless the mode of a block exists."""
    if checkpoint not in (False, True, "norms"):
        raise ValueError(f"checkpoint must be False, True or 'norms', got {checkpoint!r}")


def check_switch(block: Residual, on: bool, name: str = "") -> None:
    """Raise if the block cannot be switched to `on`; the message gives the block's name in its net."""
    check_flag(skip=on)
    if on == block.skip:
        return
    what = f"skip of {type(block).__name__}{f' {name!r}' if name else ''}"
    if on and block.shortcut is None:
        raise ValueError(f"{what} cannot be switched on: it was built with skip=False and has no shortcut")
    if isinstance(block.merge, Concat):
        raise ValueError(
            f"{what} cannot be switched at run time: its concatenation fixes the widths at construction; "
            f"build it with skip={on} instead"
        )


def residuals(net: nn.Module, where: Where | None = None) -> dict[str, Residual]:
    """The residual blocks of a net by name, in order, nested ones included.

    Names are those inside the wrappers of `torch.compile`, of data-parallel training and of weight averaging.

    Args:
        where: which blocks: a predicate `where(name, block)`, or a shell pattern that the name matches, "stages.3.*";
            None keeps all.

    Raises:
        ValueError: `where` is neither.
    """
    if not (where is None or isinstance(where, str) or callable(where)):
        raise ValueError(f"where must be a predicate of name and block, a shell pattern or None, got {where!r}")
    found = {
        plain_name(name): module for name, module in unwrapped(net).named_modules() if isinstance(module, Residual)
    }
    return {name: block for name, block in found.items() if is_chosen(name, block, where)}


def some_residuals(net: nn.Module, where: Where | None = None) -> dict[str, Residual]:
    """`residuals` of a net that has some.

    Raises:
        ValueError: it holds no `Residual`, or `where` is no choice.
    """
    if not residuals(net):
        raise ValueError(f"net must hold a Residual, got {type(net).__name__} without any, as fused nets are")
    return residuals(net, where)


def is_chosen(name: str, block: Residual, where: Where | None) -> bool:
    """Whether `where` takes the block."""
    if isinstance(where, str):
        return fnmatchcase(name, where)
    return where is None or where(name, block)


def plain_name(name: str) -> str:
    """The name of a module without what `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def set_skip(net: nn.Module, on: bool, where: Where | None = None) -> list[str]:
    """Switch the shortcuts of a net on or off and return the names of the blocks that now stand so.

    All blocks are checked before the first is switched, so an error leaves the net as it was.

    Args:
        net: a net, or a single block.
        on: True for residual, False for plain.
        where: which blocks: a predicate `where(name, block)`, or a shell pattern that the name matches, "stages.3.*";
            None takes every block.

    Raises:
        ValueError: the net holds no `Residual`, `where` is neither or chooses none, or a chosen block cannot be
            switched (built with `skip=False`, or merged by concatenation).

    Example:
        >>> net = nn.Sequential(Residual(nn.Linear(8, 8)), Residual(nn.Linear(8, 8)))
        >>> set_skip(net, False, where="1*")
        ['1']
    """
    chosen = some_residuals(net, where)
    if not chosen:
        names = ", ".join(list(residuals(net))[:3])
        raise ValueError(f"where must choose at least one block of the net ({names}, ...), got none by {where!r}")
    for name, block in chosen.items():
        check_switch(block, on, name)
    for block in chosen.values():
        block.skip = on
    return list(chosen)


@contextmanager
def skips_off(net: nn.Module, where: Where | None = None) -> Iterator[list[str]]:
    """Switch shortcuts off for a while; every block is as before on leaving, on an error too.

    The switch belongs to the net: threads that share one must not switch it at the same time.

    Args: as `set_skip`.

    Example:
        >>> net = nn.Sequential(Residual(nn.Linear(8, 8)), Residual(nn.Linear(8, 8)))
        >>> with skips_off(net, where=lambda name, block: name == "1"):
        ...     [block.skip for block in net]
        [True, False]
    """
    before = [(block, block.skip) for block in residuals(net).values()]  # not by `where`, which may draw lots
    try:
        yield set_skip(net, False, where)
    finally:
        for block, on in before:
            block.skip = on
