"""How a branch joins its shortcut: drop path, scales and starts, merges beside `Add` and `Concat`."""

from __future__ import annotations

from itertools import dropwhile

import torch
from torch import Tensor, nn

from resblocks.checks import check_dims, check_probability
from resblocks.layers import FrozenBatchNorm, WeightStandardised, by_dims, convolution, over_positions
from resblocks.residual import fitting

torch.fx.wrap("fitting")  # known by the module whose forward calls it


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016, sec. 3): in training drops the whole branch of a sample.

    A sample's branch is set to zero with probability `p`; the branches that stay are divided by 1 - p, so that the
    mean is that of evaluation, where nothing is dropped or scaled. (The paper drops for a whole batch, which saves the
    branch's time, and scales in evaluation instead.)

    Args:
        p: probability of dropping, at least 0 and below 1.

    Shape: (N, ...) -> same.

    Raises:
        ValueError: p outside its range.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        check_probability(p=p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty(x.shape[:1] + (1,) * (x.dim() - 1)).bernoulli_(1 - self.p)  # of x, so that vmap knows it
        return x * (keep / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class ZeroInit(nn.Identity):
    """The branch as it is, but its last norm starts at zero, so that the block starts as its shortcut.

    From Goyal et al. 2017, sec. 5.1. In a pre-activation branch, or one without norm weights, it is the last
    convolution: a norm at zero before an activation would pass no gradient.

    Shape: any -> same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()

    def start_branch(self, branch: nn.Module) -> None:
        """Set the last weight to zero.

        Raises:
            ValueError: it is that of a convolution, and a norm without weight reads it.
        """
        *_, (name, last) = branch_weights(branch, ("conv", "norm")).items()
        if name.startswith("conv"):
            check_no_norm_behind(branch, name, "ZeroInit")
        nn.init.zeros_(last)


def branch_weights(branch: nn.Module, kinds: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The weights of the direct children of a branch whose names start with one of the kinds, by name, in order.

    Raises:
        ValueError: there are none.
    """
    weights = {
        name: getattr(layer, "weight", None) for name, layer in branch.named_children() if name.startswith(kinds)
    }
    found = {name: weight for name, weight in weights.items() if isinstance(weight, nn.Parameter)}
    if not found:
        raise ValueError(
            f"scale needs a branch with weights in its {' or '.join(kinds)} layers that are parameters, not computed "
            f"by a parametrization or pruning, got {list(weights)}"
        )
    return found


def check_no_norm_behind(branch: nn.Module, conv: str, scale: str) -> None:
    """Raise where a norm that measures its input reads the convolution of that name: one step undoes a zero there."""
    for name, norm in dropwhile(lambda child: child[0] != conv, branch.named_children()):
        if name.startswith("norm") and not isinstance(norm, (nn.Identity, FrozenBatchNorm)):
            raise ValueError(
                f"scale {scale} starts the last convolution at zero, which needs no norm behind it (norm=None), "
                f"got {norm}"
            )


class LayerScale(nn.Module):
    """A factor for each channel, small at the start (Touvron et al. 2021, eq. 4). Shape: (N, channels, ...) -> same.

    Args:
        channels: of the branch.
        initial: factor at the start.
        dim: where the channels are: -1 for tokens, (N, tokens, channels).
    """

    def __init__(self, channels: int, initial: float = 1e-5, dim: int = 1) -> None:
        super().__init__()
        self.initial, self.dim = initial, dim
        self.weight = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to `initial`."""
        nn.init.constant_(self.weight, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        if self.dim == 1:
            return x * over_positions(self.weight, x)
        return (x.movedim(self.dim, -1) * self.weight).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        where = "" if self.dim == 1 else f", dim={self.dim}"
        return f"{self.weight.numel()}, initial={self.initial}{where}"


class SkipInit(nn.Module):
    """One factor for the whole branch, zero at the start (De and Smith 2020, sec. 4).

    Its weight has the shape (1,), since FSDP shards no scalars. It takes the number of channels, which `scale` hands
    to every class, and needs none.

    Shape: (N, ...) -> same.
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the shortcut alone."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class ReZero(SkipInit):
    """One factor for the whole branch, zero at the start (Bachlechner et al. 2021, eq. 1); SkipInit by another name.

    Shape: (N, ...) -> same.
    """


class Fixup(nn.Module):
    """One factor for the branch and a start that trains without norm (Zhang et al. 2019, "Fixup", sec. 3).

    The last convolution of the branch starts at zero, and the other convolutions are drawn smaller by
    num_blocks ** (-1 / (2 m - 2)) for m convolutions. `ResNet` sets num_blocks and starts its head at zero. Use it
    with `norm=None`: the biases of the convolutions, one a channel, stand for the paper's scalar ones.

    Shape: any -> same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_blocks = 1
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with the factor 1."""
        nn.init.ones_(self.weight)

    def start_branch(self, branch: nn.Module) -> None:
        """Make the drawn weights smaller and the last convolution zero.

        Raises:
            ValueError: the branch has no convolutions, or norms or convolutions that standardise, which undo it.
        """
        if any(isinstance(layer, WeightStandardised) for layer in branch.children()):
            raise ValueError(f"scale Fixup needs convolutions that keep the size of their weights, got {branch}")
        *others, (name, last) = branch_weights(branch, ("conv",)).items()
        check_no_norm_behind(branch, name, "Fixup")
        nn.init.zeros_(last)
        with torch.no_grad():
            for _, weight in others:
                weight.mul_(self.num_blocks ** (-1 / (2 * len(others))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class WeightedAdd(nn.Module):
    """Weighted sum of shortcut and branch, two learned weights that start at 1 (after Shen and Zeng 2016, eq. 3).

    Shape: two tensors of one shape -> that shape.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shortcut_weight = nn.Parameter(torch.empty(1))
        self.branch_weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the plain sum."""
        nn.init.ones_(self.shortcut_weight)
        nn.init.ones_(self.branch_weight)

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return self.shortcut_weight * shortcut + self.branch_weight * fitting(branch, shortcut)


class Gated(nn.Module):
    """Highway merge (Srivastava et al. 2015, eq. 3): gate * branch + (1 - gate) * shortcut.

    The gate is the sigmoid of a 1x1 convolution of the shortcut.

    Args:
        channels: of shortcut and branch.
        dims: number of spatial dimensions.
        start: what the gate starts near, before its sigmoid; negative favours the shortcut, as the paper advises.

    Shape: two tensors of one shape -> that shape.
    """

    def __init__(self, channels: int, dims: int = 2, start: float = -2.0) -> None:
        super().__init__()
        check_dims(dims)
        self.start = start
        self.gate = convolution[dims - 1](channels, channels, 1)

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(shortcut) + self.start)
        return (1 - gate) * shortcut + gate * fitting(branch, shortcut)

    def extra_repr(self) -> str:
        return f"start={self.start}"


#: `Gated` for 1D, 2D and 3D, the value for the option `merge`.
#:
#: :meta hide-value:
gated = by_dims(Gated)
