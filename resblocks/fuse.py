"""What makes a finished net fast: norms folded into convolutions; convolution, addition and ReLU in one operator."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resblocks.blocks import DenseBlock, Transition
from resblocks.checks import check_input_size, check_positive, explained
from resblocks.dense_plan import dense_branch, pool_commutes, window
from resblocks.fused import Affine, AffineReLU, Clamp, FusedConv, FusedDenseBlock, FusedResidual, FusedStage
from resblocks.joins import DropPath, ZeroInit
from resblocks.layers import FrozenBatchNorm, avg_pool, batch_norm, convolution, running_affine, weight_standardised
from resblocks.residual import PASSES_ON, Add, Residual, keeps_forward
from resblocks.undisturbed import hooked
from resblocks.watched import is_watched


@torch.inference_mode(False)  # its tensors are to be such as `load_state_dict` can write to
@torch.no_grad()
def fuse(
    net: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
    input_size: Sequence[int] | None = None,
    batch_size: int = 1,
) -> nn.Module:
    """A frozen copy of the net for inference, the same function of its input up to rounding.

    Every batch norm that follows a convolution is folded into it, in float32 or wider, before any cast. Where torch
    has the operator (oneDNN on the CPU, cuDNN on CUDA) a convolution, the addition of the shortcut and a ReLU run as
    one; elsewhere, under `torch.compile` and under `torch.export` the plain operators run, and give the same values.
    Dense blocks write into one buffer, and what their norms do before a 1x1 convolution is folded into it too.

    Args:
        net: any module; its `Residual` blocks, dense blocks and `nn.Sequential` parts are fused, the rest is copied
            as it is.
        dtype: of the copy's parameters and inputs; None keeps that of the net.
        channels_last: lay the weights of 2D convolutions out for channels_last inputs, which are faster.
        input_size: one sample without the batch dimension, for instance (3, 224, 224). Weights of 2D convolutions are
            then also kept in the layout that oneDNN likes best for this size, which takes their memory twice and is
            faster. Other sizes give right results, as fast as without. It is a matter of the CPU: on other devices
            there is nothing to lay out.
        batch_size: of the inputs that the layout is for.

    Returns:
        A net in evaluation mode whose parameters need no gradient. It does not train: what is fused stays in evaluation
        mode after `train()`. Its state dict does not depend on input_size; copies, pickles and `to` keep the layout.

    Shape: that of the net.

    Raises:
        ValueError: input_size is not a sequence of positive integers or the net does not take it, batch_size is below 1
            or given without it.

    Example:
        >>> from resblocks import create_model
        >>> net = create_model("resnet18").eval()
        >>> fast = fuse(net, input_size=(3, 64, 64))
        >>> x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        >>> bool(torch.allclose(fast(x), net(x), rtol=1e-3, atol=1e-4))
        True
    """
    check_sizes(input_size, batch_size)
    fused = copied(net).eval()
    if any(parameter.dtype in HALF for parameter in fused.parameters()):
        dtype = next(fused.parameters()).dtype if dtype is None else dtype
        fused = fused.float()  # fold in float32, then cast: the other order loses most of the digits
    fused = Fuser(clamps=dtype not in HALF).replace(fused)
    if dtype not in HALF:
        replace_norms(fused)
    if dtype is not None:
        fused = fused.to(dtype)
    fused.requires_grad_(False)
    last = channels_last and any(parameter.dim() == 4 for parameter in fused.parameters())
    if last:
        for parameter in (parameter for parameter in fused.parameters() if parameter.dim() == 4):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if input_size is not None:
        prepack(fused, (batch_size, *input_size), torch.channels_last if last else torch.contiguous_format)
    return fused


def copied(net: nn.Module) -> nn.Module:
    """A copy of the net, also where pruning and the like have left a weight that they computed with its graph."""
    computed = [value for module in net.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(net, {id(value): value.detach() for value in computed if not value.is_leaf})


def replace_norms(net: nn.Module) -> None:
    """Put an `Affine` in the place of each norm of kept statistics that is left."""
    for parent in list(net.modules()):
        for name, norm in parent._modules.items():
            if norm is not None and may_be_affine(norm):
                setattr(parent, name, Affine(norm))


HALF = (torch.float16, torch.bfloat16)


def check_sizes(input_size: Sequence[int] | None, batch_size: int) -> None:
    """Raise unless input_size and batch_size are positive integers, batch_size with input_size only."""
    if input_size is not None:
        check_input_size(input_size)
    check_positive(batch_size=batch_size)
    if input_size is None and batch_size != 1:
        raise ValueError(f"batch_size must be 1 without input_size, got {batch_size}")


def prepack(net: nn.Module, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """Lay the weights of the fused convolutions out for what reaches each of them when the net reads this shape."""
    seen: dict[FusedConv, torch.Size] = {}

    def note(conv: Any, args: tuple[Tensor, ...]) -> None:
        seen[conv] = args[0].shape

    convs = [layer for layer in net.modules() if isinstance(layer, FusedConv)]
    if not convs:
        return
    like = next(net.parameters())
    with hooked([conv.register_forward_pre_hook(note) for conv in convs]), explained(net, shape[1:]):
        net(torch.zeros(shape, dtype=like.dtype, device=like.device).to(memory_format=memory_format))
    for conv, read in seen.items():
        conv.pack(read)


class Fuser:
    """Replaces what it can in a net.

    Args:
        clamps: whether an affine before a ReLU may move behind it, into a convolution; half precision is too coarse.
    """

    def __init__(self, clamps: bool) -> None:
        self.clamps = clamps
        self.made: dict[nn.Module, nn.Module] = {}  # a module that serves in several places is replaced once

    def replace(self, module: nn.Module) -> nn.Module:
        """The module with its sequences, residual and dense blocks fused; it is changed itself."""
        if module not in self.made:
            for name, child in module._modules.items():  # named_children leaves repeated ones out
                if child is not None:
                    setattr(module, name, self.replace(child))
            self.made[module] = self.fused(module)
        return self.made[module]

    def fused(self, module: nn.Module) -> nn.Module:
        """What stands for a module whose children are fused; one that somebody watches stays."""
        if is_watched(module):
            return module
        if type(module) in (DropPath, ZeroInit, *PASSES_ON):
            return nn.Identity()
        if type(module) is nn.Sequential:
            return self.sequence(module)
        if type(module) is Transition:
            return self.sequence(pool_first(module))
        if type(module) is DenseBlock:
            return fused_dense_block(module)
        return fused_residual(module) if isinstance(module, Residual) else module

    def sequence(self, layers: nn.Sequential) -> nn.Sequential:
        """Convolutions with the norms and ReLUs around them taken in, under the names of the convolutions."""
        fused = fused_sequence(layers)
        fused = rectified_sequence(clamped_sequence(fused) if self.clamps else fused)
        in_stage = any(type(layer) is FusedResidual for layer in fused)
        return FusedStage(OrderedDict(fused._modules)) if in_stage else fused


def fused_sequence(sequence: nn.Sequential) -> nn.Sequential:
    """Convolutions with the norms and ReLUs that follow them taken in."""
    fused = nn.Sequential()
    last: nn.Module | None = None
    for name, layer in sequence._modules.items():
        assert layer is not None
        if is_watched(layer):
            last = None
            fused.add_module(name, layer)
        elif isinstance(last, _ConvNd) and is_foldable(layer, last.out_channels):
            last = FusedConv(last, layer)
            fused[-1] = last
        elif isinstance(last, _ConvNd | FusedConv) and type(layer) is nn.ReLU:
            taken = FusedConv(last) if isinstance(last, _ConvNd) else last
            taken.relu, fused[-1], last = True, taken, None
        elif type(layer) is not nn.Identity:
            last = layer if is_fusible(layer) else None
            fused.add_module(name, layer)
    for index, layer in enumerate(fused):
        if isinstance(layer, _ConvNd) and is_fusible(layer):
            fused[index] = FusedConv(layer)
    return fused


FUSIBLE = (*convolution, *weight_standardised)


def is_fusible(layer: Any) -> bool:
    """Whether it is a convolution that a `FusedConv` can stand for."""
    plain = type(layer) in FUSIBLE and not is_watched(layer)
    return plain and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def is_foldable(norm: Any, channels: int) -> bool:
    """Whether it normalises so many channels by statistics that are kept."""
    return keeps_statistics(norm) and norm.running_mean.numel() == channels


def keeps_statistics(norm: Any) -> bool:
    """Whether it is a batch norm that is an affine in evaluation mode."""
    return type(norm) in (*batch_norm, nn.SyncBatchNorm, FrozenBatchNorm) and norm.running_mean is not None


def clamped_sequence(sequence: nn.Sequential) -> nn.Sequential:
    """The same with a `Clamp` for each norm and ReLU whose affine the convolution behind them can take in."""
    fused, layers = nn.Sequential(), list(sequence)
    taken: set[int] = set()
    for at, name in enumerate(sequence._modules):
        reader = reader_of(layers[at : at + 4])
        if reader is not None:
            scale, shift = running_affine(layers[at])
            scale = scale.where(torch.isfinite(shift / scale), 0)  # one too small to clamp by is none
            fused.add_module(name, Clamp(scale, shift, reader.weight.dim() - 2))
            reader.take_in(scale, torch.where(scale == 0, shift.relu(), shift))
            taken.add(at + 1)
        elif at not in taken:
            fused.add_module(name, layers[at])
    return fused


def rectified_sequence(sequence: nn.Sequential) -> nn.Sequential:
    """The same with an `AffineReLU` for each norm and ReLU that are left."""
    fused, last = nn.Sequential(), None
    for name, layer in sequence._modules.items():
        if type(layer) is nn.ReLU and not is_watched(layer) and last is not None and may_be_affine(last):
            fused[-1], last = AffineReLU(last), None
        else:
            fused.add_module(name, layer)
            last = layer
    return fused


def may_be_affine(norm: nn.Module) -> bool:
    """Whether scale and shift can stand for it, and nobody looks on."""
    return not is_watched(norm) and keeps_statistics(norm) and is_exact(norm)


def reader_of(layers: list[nn.Module]) -> FusedConv | None:
    """The convolution behind norm, ReLU and perhaps an average pool that can take in the affine of the norm."""
    if len(layers) < 3 or type(layers[1]) is not nn.ReLU or any(is_watched(layer) for layer in layers):
        return None
    norm, _, conv, *rest = layers
    if type(conv) in avg_pool and window(conv) > 0 and rest:
        conv = rest[0]
    if not isinstance(conv, FusedConv) or conv.geometry.groups > 1 or any(conv.geometry.padding):
        return None
    return conv if is_foldable(norm, conv.weight.shape[1]) and is_exact(norm) else None


def is_exact(norm: Any) -> bool:
    """Whether few digits are lost when scale and shift of the norm work apart.

    They cancel where a mean is far above its deviation: 16 times what the norm puts out costs 4 of 24 bits.
    """
    _, shift = running_affine(norm)
    gamma = torch.ones_like(shift) if norm.weight is None else norm.weight
    size = gamma.abs() + (0 if norm.bias is None else norm.bias.abs())
    return bool(shift.abs().max() <= 16 * size.mean())


def pool_first(transition: Transition) -> nn.Sequential:
    """Its layers in the order in which it runs them: the pool before a convolution that works within positions."""
    *before, conv, pool = transition.named_children()
    last = [pool, conv] if pool_commutes(conv[1], pool[1]) else [conv, pool]
    return nn.Sequential(OrderedDict([*before, *last]))


def fused_dense_block(block: DenseBlock) -> nn.Module:
    """The block with its layers in one buffer, where each of them is a branch that ends in a convolution."""
    layers: dict[str, nn.Sequential] = {}
    growths = []
    for name, layer in block.named_children():
        branch = dense_branch(layer)
        if branch is None or any(is_watched(part) for part in (layer, *layer.children())):
            return block
        last = branch[-1]
        if not isinstance(last, FusedConv):
            return block
        layers[name] = branch
        growths.append(len(last.weight))
    return FusedDenseBlock(layers, growths)


def fused_residual(block: Residual) -> nn.Module:
    """The block with its addition in its last convolution, where the branch ends in one."""
    branch, between = block.branch, [type(part) for part in (block.merge, block.scale, block.drop_path)]
    if not block.skip or not keeps_forward(block) or between != [Add, nn.Identity, nn.Identity]:
        return block
    if any(is_watched(part) for part in (branch, block.merge, block.scale, block.drop_path, block.act)):
        return block
    if not isinstance(branch, nn.Sequential) or not len(branch) or not isinstance(branch[-1], FusedConv):
        return block
    if branch[-1].relu or type(block.act) not in (nn.ReLU, nn.Identity):
        return block
    last = branch[-1].rectified() if type(block.act) is nn.ReLU else branch[-1]
    assert block.shortcut is not None
    return FusedResidual(block.preact, branch[:-1], last, block.shortcut)
