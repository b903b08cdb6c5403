"""What a fused net is made of: convolutions that add and rectify, dense layers that clamp; see `resblocks.fuse`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resblocks import winograd
from resblocks.fused_operators import (
    Geometry,
    Packed,
    Source,
    affine,
    affine_relu,
    conv_add_relu,
    fits_winograd,
    packed_weight,
    runs_eagerly,
    winograd_is_faster,
)
from resblocks.layers import WeightStandardised, layout_of, over_positions, running_affine
from resblocks.watched import is_watched

torch.fx.wrap("conv_add_relu")
torch.fx.wrap("affine")
torch.fx.wrap("affine_relu")


class Frozen(nn.Module):
    """A module that `train()` does not wake: the norm that would train is gone."""

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode."""
        return super().train(False)


class FusedConv(Frozen):
    """A convolution with the norm behind it in its weights, which may also add a map and apply a ReLU.

    Its state dict holds weight and bias alone. A prepacked weight is made of them anew after `load_state_dict`, `to`,
    a copy and a pickle.

    Shape: as the convolution's; `other`, which is added before the ReLU, has the shape of the output, and may be
    written over on request.
    """

    packed: Packed | None = None

    def __init__(self, conv: _ConvNd, norm: nn.Module | None = None) -> None:
        super().__init__()
        weight, bias = folded(conv, norm)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        padding = [int(padding) for padding in conv.padding]
        self.geometry = Geometry(list(conv.stride), padding, list(conv.dilation), conv.groups)
        self.relu = False

    def forward(self, x: Tensor, other: Tensor | None = None, over: bool = False) -> Tensor:
        packed = self.packed if runs_eagerly(x) and self.is_packed() else None  # nothing that traces knows the layout
        return conv_add_relu(x, self.weight, self.bias, other, self.relu, self.geometry, packed, over)

    def pack(self, shape: Sequence[int], by_winograd: bool | None = None) -> None:
        """Lay the weight out for inputs of this shape, the batch included; None measures which way is faster."""
        fits = fits_winograd(self.weight, shape, self.geometry)
        if by_winograd is None and fits:
            by_winograd = winograd_is_faster(tuple(shape), len(self.weight), torch.get_num_threads())
        quick, source = bool(by_winograd and fits), Source.of(self.weight)
        laid = winograd.transform_weight(self.weight) if quick else packed_weight(self.weight, shape, self.geometry)
        self.packed = Packed(tuple(shape), quick, laid, source)

    def is_packed(self) -> bool:
        """Whether the weight is still what was packed."""
        source = self.packed.source if self.packed else None
        return source is not None and source.is_still(self.weight)

    def rectified(self) -> FusedConv:
        """The same convolution, weights shared, with a ReLU."""
        twin = copy.deepcopy(self, {id(weight): weight for weight in self.parameters()})
        twin.relu = True
        return twin

    def take_in(self, scale: Tensor, shift: Tensor) -> None:
        """Read z where `scale * z + shift` was read; the convolution must not pad."""
        weight = self.weight.detach()
        moved = (weight * over_positions(shift, weight)).flatten(1).sum(1)  # not a product that autocast would round
        bias = moved if self.bias is None else moved + self.bias
        self.weight = nn.Parameter(weight * over_positions(scale, weight), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def _repack(self) -> None:
        if self.packed is not None:
            self.pack(self.packed.shape, self.packed.by_winograd)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedConv:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._repack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._repack()

    def __getstate__(self) -> dict[str, Any]:
        # The layout belongs to this machine's oneDNN, and torch can neither copy nor save it.
        return {**self.__dict__, "packed": self.packed and self.packed._replace(weight=None, source=None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._repack()

    def extra_repr(self) -> str:
        out, into, *kernel = self.weight.shape
        said = f"{into * self.geometry.groups}, {out}, kernel_size={tuple(kernel)}"
        said += f", stride={tuple(self.geometry.stride)}, relu={self.relu}"
        if self.packed is not None:
            said += f", packed for {self.packed.shape}" + (" by Winograd" if self.packed.by_winograd else "")
        return said


class FusedResidual(nn.Module):
    """A residual block whose last convolution adds the shortcut and applies the activation.

    Shape: that of the block.
    """

    def __init__(self, preact: nn.Module, branch: nn.Sequential, last: FusedConv, shortcut: nn.Module) -> None:
        super().__init__()
        self.preact, self.branch, self.last, self.shortcut = preact, branch, last, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, owned=False)

    def run(self, x: Tensor, owned: bool) -> Tensor:
        """The block; it may write over an input that is `owned`."""
        h = self.preact(x)
        y = self.branch(h)
        shortcut = self.shortcut(h)
        free = runs_eagerly(x) and (ends_in_conv(self.shortcut) or (owned and shortcut is x))
        out: Tensor = self.last(y, shortcut, free and is_large(shortcut) and is_unseen(self))
        return out


class FusedStage(nn.Sequential):
    """Blocks in a row, each of which may write over what the one before it put out.

    A new tensor for each sum would be memory that the system hands out page by page: on a CPU a tenth of the time of a
    ResNet-50 at batch 1.

    Shape: that of the blocks.
    """

    def forward(self, x: Tensor) -> Tensor:
        owned, eager = False, runs_eagerly(x)
        for block in self:
            if eager and type(block) is FusedResidual and not is_watched(block):
                x, owned = block.run(x, owned), not is_watched(block.last)
            else:
                out: Tensor = block(x)
                x, owned = out, False
        return x


def records_gradients(module: nn.Module) -> bool:
    """Whether gradients of its weights are asked for, after somebody thawed them."""
    return torch.is_grad_enabled() and any(weight.requires_grad for weight in module.parameters())


def ends_in_conv(shortcut: nn.Module) -> bool:
    """Whether the shortcut puts out a new tensor, that of a convolution."""
    return type(shortcut) is nn.Sequential and len(shortcut) > 0 and type(shortcut[-1]) is FusedConv


def is_large(x: Tensor) -> bool:
    """Whether a new tensor of that size on the CPU is memory from the system, not what the process freed before."""
    return x.device.type == "cpu" and x.numel() * x.element_size() >= 2**18


def is_unseen(block: nn.Module) -> bool:
    """Whether nobody could tell that a block writes over what its parts have read; a stranger may keep it."""
    return all(type(part).__module__.startswith(KNOWN) and not is_watched(part) for part in block.modules())


KNOWN = ("torch.nn.modules.", "resblocks.")


class FusedDenseBlock(nn.Sequential):
    """Dense layers that write their maps side by side in one buffer, the output of the block.

    Shape: that of the block.
    """

    def __init__(self, layers: dict[str, nn.Sequential], growths: Sequence[int]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.growths = list(growths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            layers: Any = dict([*self._modules.items()][index])
            return FusedDenseBlock(layers, self.growths[index])
        return super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        if not runs_eagerly(x) or records_gradients(self):
            for layer in self:
                x = torch.cat([x, layer(x)], 1)
            return x
        stop, memory_format = x.shape[1], layout_of(x)
        shape = (x.shape[0], stop + sum(self.growths), *x.shape[2:])
        maps = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
        maps[:, :stop] = x
        for layer, growth in zip(self, self.growths, strict=True):
            read = maps[:, :stop]
            if not isinstance(next(layer.children()), Clamp):  # which reads the slice as it lies
                read = read.contiguous(memory_format=memory_format)
            maps[:, stop : stop + growth] = layer(read)
            stop += growth
        return maps


class Clamp(Frozen):
    """Half of a norm and a ReLU before a convolution, whose other half is in the weights.

    For scale > 0 it is `relu(scale * x + shift) = scale * max(x, t) + shift` with `t = -shift / scale`, for scale < 0
    a minimum, and for scale = 0 a constant. The affine that is left is linear, and the convolution takes it in: what
    took passes over the maps takes one.

    Shape: (N, channels, ...) -> same.
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, dims: int) -> None:
        super().__init__()
        edge = torch.where(scale == 0, 0.0, -shift / scale)
        shape = (1, -1, *[1] * dims)
        self.register_buffer("lower", edge.where(scale >= 0, -math.inf).view(shape))
        self.register_buffer("upper", edge.where(scale <= 0, math.inf).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.lower, self.upper)

    def extra_repr(self) -> str:
        return str(self.lower.numel())


class Affine(Frozen):
    """A norm that no convolution takes in, as scale and shift of each channel.

    Not a batch norm in evaluation mode, because quantisers fold one into the convolution before it, also where a
    shortcut or a concatenation reads that convolution, too (torchao 0.18, `prepare_pt2e`).

    Shape: (N, channels, ...) -> same.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: Any) -> None:
        super().__init__()
        for name, value in zip(("scale", "shift"), running_affine(norm), strict=True):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.scale, self.shift)

    def extra_repr(self) -> str:
        return str(self.scale.numel())


class AffineReLU(Affine):
    """Such a norm with the ReLU behind it.

    Shape: (N, channels, ...) -> same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return affine_relu(x, self.scale, self.shift)


def folded(conv: _ConvNd, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution with the norm behind it in evaluation mode."""
    weight = conv.standardised() if isinstance(conv, WeightStandardised) else conv.weight
    if norm is None:
        return weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone()
    scale, shift = running_affine(norm)
    shift = shift if conv.bias is None else shift + conv.bias * scale
    return (weight * over_positions(scale[:, None], weight)).detach(), shift.detach()
