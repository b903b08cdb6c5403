"""What makes a finished net fast: norms folded into convolutions; convolution, addition and ReLU in one operator."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resblocks.layers import DropPath, FrozenBatchNorm, convolution
from resblocks.layers import _WeightStandardised as WeightStandardised
from resblocks.residual import Add, Residual, fitting


def fuse(net: nn.Module, *, dtype: torch.dtype | None = None, channels_last: bool = True) -> nn.Module:
    """A frozen copy of the net for inference, the same function of its input up to rounding.

    Every batch norm that follows a convolution is folded into it, in float32 or wider, before any cast. Where torch
    has the operator (oneDNN on the CPU, cuDNN on CUDA) a convolution, the addition of the shortcut and a ReLU run as
    one; elsewhere, under `torch.compile` and under `torch.export` the plain operators run, and give the same values.

    Args:
        net: any module; its `Residual` blocks and `nn.Sequential` parts are fused, the rest is copied as it is.
        dtype: of the copy's parameters and inputs; None keeps that of the net.
        channels_last: lay the weights of 2D convolutions out for channels_last inputs, which are faster.

    Returns: a net in evaluation mode whose parameters need no gradient. It can not train: `train(True)` raises.

    Shape: that of the net.

    Example:
        >>> from resblocks import create_model
        >>> net = create_model("resnet18").eval()
        >>> fast = fuse(net)
        >>> x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        >>> bool(torch.allclose(fast(x), net(x), rtol=1e-3, atol=1e-4))
        True
    """
    fused = copy.deepcopy(net).eval()
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in fused.parameters()):
        dtype = next(fused.parameters()).dtype if dtype is None else dtype
        fused = fused.float()  # fold in float32, then cast: the other order loses most of the digits
    fused = replace(fused)
    if dtype is not None:
        fused = fused.to(dtype)
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    if channels_last and any(parameter.dim() == 4 for parameter in fused.parameters()):
        fused = fused.to(memory_format=torch.channels_last)
    return fused


class FusedConv(nn.Module):
    """A convolution with the norm behind it in its weights, which may also add a map and apply a ReLU.

    Shape: as the convolution's; `other`, which is added before the ReLU, has the shape of the output.
    """

    def __init__(self, conv: _ConvNd, norm: nn.Module | None = None) -> None:
        super().__init__()
        weight, bias = folded(conv, norm)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.padding = [int(padding) for padding in conv.padding]
        self.stride, self.dilation, self.groups = list(conv.stride), list(conv.dilation), conv.groups
        self.relu = False

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return conv_add_relu(x, self.weight, self.bias, other, self.relu, *geometry)

    def train(self, mode: bool = True) -> FusedConv:
        """Evaluation only.

        Raises:
            RuntimeError: mode is True: the norm that would train is gone.
        """
        if mode:
            raise RuntimeError(
                "a fused net cannot train: its norms are folded into its convolutions; train the net itself"
            )
        return super().train(mode)

    def extra_repr(self) -> str:
        out, into, *kernel = self.weight.shape
        return (
            f"{into * self.groups}, {out}, kernel_size={tuple(kernel)}, stride={tuple(self.stride)}, relu={self.relu}"
        )


class FusedResidual(nn.Module):
    """A residual block whose last convolution adds the shortcut and applies the activation.

    Shape: that of the block.
    """

    def __init__(self, preact: nn.Module, branch: nn.Sequential, last: FusedConv, shortcut: nn.Module) -> None:
        super().__init__()
        self.preact, self.branch, self.last, self.shortcut = preact, branch, last, shortcut

    def forward(self, x: Tensor) -> Tensor:
        h = self.preact(x)
        y: Tensor = self.last(self.branch(h), self.shortcut(h))
        return y


def folded(conv: _ConvNd, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution with the norm behind it in evaluation mode."""
    weight = conv.standardised() if isinstance(conv, WeightStandardised) else conv.weight
    if norm is None:
        return weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone()
    factor = torch.rsqrt(norm.running_var + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean * factor if conv.bias is None else (conv.bias - norm.running_mean) * factor
    shift = shift if norm.bias is None else shift + norm.bias
    return (weight * factor.view(-1, *[1] * (weight.dim() - 1))).detach(), shift.detach()


def replace(module: nn.Module) -> nn.Module:
    """The module with its sequences and residual blocks fused."""
    for name, child in list(module.named_children()):
        setattr(module, name, replace(child))
    if isinstance(module, DropPath | nn.Dropout):
        return nn.Identity()
    if type(module) is nn.Sequential:
        return fused_sequence(module)
    return fused_residual(module) if isinstance(module, Residual) else module


def fused_sequence(sequence: nn.Sequential) -> nn.Sequential:
    """Convolutions with the norms and ReLUs that follow them taken in, under the names of the convolutions."""
    fused = nn.Sequential()
    last: nn.Module | None = None
    for name, layer in sequence.named_children():
        if isinstance(last, _ConvNd) and is_foldable(layer, last.out_channels):
            last = FusedConv(last, layer)
            fused[-1] = last
        elif isinstance(last, _ConvNd | FusedConv) and type(layer) is nn.ReLU:
            taken = FusedConv(last) if isinstance(last, _ConvNd) else last
            taken.relu, fused[-1], last = True, taken, None
        elif not isinstance(layer, nn.Identity):
            last = layer if type(layer) in FUSIBLE else None
            fused.add_module(name, layer)
    for index, layer in enumerate(fused):
        if isinstance(layer, _ConvNd) and type(layer) in FUSIBLE:
            fused[index] = FusedConv(layer)
    return fused


FUSIBLE = (*convolution, *WeightStandardised.__subclasses__())


def is_foldable(norm: nn.Module, channels: int) -> bool:
    """Whether it normalises so many channels by statistics that are kept."""
    if isinstance(norm, FrozenBatchNorm):
        return True
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
        return False
    return norm.running_mean.numel() == channels


def fused_residual(block: Residual) -> nn.Module:
    """The block with its addition in its last convolution, where the branch ends in one."""
    sums = block.skip and type(block.merge) is Add and isinstance(block.scale, nn.Identity)
    branch = block.branch
    if not sums or not isinstance(branch, nn.Sequential) or not len(branch) or not isinstance(branch[-1], FusedConv):
        return block
    if branch[-1].relu or type(block.act) not in (nn.ReLU, nn.Identity):
        return block
    last = branch[-1]
    last.relu = type(block.act) is nn.ReLU
    assert block.shortcut is not None
    return FusedResidual(block.preact, branch[:-1], last, block.shortcut)


@torch.fx.wrap
def conv_add_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`relu(conv(x) + other)` in one operator where torch has it; `other` and the ReLU may be left out."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad) or weight.dim() != 4:
        return plain_conv_add_relu(x, weight, bias, other, relu, stride, padding, dilation, groups)
    if x.device.type == "cpu" and x.dtype == weight.dtype and has_onednn(x.dtype):
        onednn: Any = torch.ops.mkldnn._convolution_pointwise
        geometry = (padding, stride, dilation, groups)
        if other is None:
            alone: Tensor = onednn(x, weight, bias, *geometry, "relu" if relu else "none", [], "")
            return alone
        return fitting(
            onednn.binary(x, other, weight, bias, *geometry, "add", 1.0, "relu" if relu else None, [], ""), other
        )
    if x.is_cuda and relu and x.dtype == weight.dtype and has_cudnn(x.dtype):
        if other is None:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        return torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, stride, padding, dilation, groups)
    return plain_conv_add_relu(x, weight, bias, other, relu, stride, padding, dilation, groups)


def plain_conv_add_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The same by the operators that every backend has."""
    conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[weight.dim() - 3]
    y = conv(x, weight, bias, stride, padding, dilation, groups)
    if other is not None:
        y = other + fitting(y, other)
    return torch.relu(y) if relu else y


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch's own fused oneDNN operator runs here and is right; it is not part of torch's public interface."""
    return _runs_right(torch.device("cpu"), dtype)


@cache
def has_cudnn(dtype: torch.dtype) -> bool:
    """Whether torch's fused cuDNN operators run here and are right."""
    return _runs_right(torch.device("cuda"), dtype)


def _runs_right(device: torch.device, dtype: torch.dtype) -> bool:
    x, other = torch.ones(1, 2, 3, 3, device=device, dtype=dtype), torch.ones(1, 2, 3, 3, device=device, dtype=dtype)
    weight, bias = (
        torch.full((2, 2, 1, 1), -0.25, device=device, dtype=dtype),
        torch.zeros(2, device=device, dtype=dtype),
    )
    geometry = ([1, 1], [0, 0], [1, 1], 1)
    try:
        if device.type == "cpu":
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                x, other, weight, bias, [0, 0], [1, 1], [1, 1], 1, "add", 1.0, "relu", [], ""
            )
        else:
            y = torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *geometry)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool(torch.equal(y, plain_conv_add_relu(x, weight, bias, other, True, *geometry)))
