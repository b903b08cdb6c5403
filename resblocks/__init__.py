"""Composable residual blocks for PyTorch, each with a skip switch, and the networks made of them."""

from resblocks.attention import CBAM, ECA, SE, cbam
from resblocks.blocks import (
    BasicBlock,
    Bottleneck,
    DenseBlock,
    DenseLayer,
    PreActBasicBlock,
    PreActBottleneck,
    ResNeXtBlock,
    Transition,
    WideBlock,
)
from resblocks.config import from_config, to_config
from resblocks.init import draw_like_torch, init_weights
from resblocks.joins import DropPath, Fixup, Gated, LayerScale, ReZero, SkipInit, WeightedAdd, ZeroInit, gated
from resblocks.layers import (
    BlurPool,
    FrozenBatchNorm,
    LayerNorm,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    average_downsample,
    blur_downsample,
    freeze_norm,
    group_norm,
    instance_norm,
    weight_standardised,
)
from resblocks.models import create_model, list_models
from resblocks.nets import BaselineCNN, DenseNet, Network, ResNet
from resblocks.residual import Add, Concat, Residual, residuals, set_skip, skips_off

__version__ = "0.1.0"

__all__ = [
    "CBAM",
    "ECA",
    "SE",
    "Add",
    "BaselineCNN",
    "BasicBlock",
    "BlurPool",
    "Bottleneck",
    "Concat",
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "DropPath",
    "Fixup",
    "FrozenBatchNorm",
    "Gated",
    "LayerNorm",
    "LayerScale",
    "Network",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ReZero",
    "ResNeXtBlock",
    "ResNet",
    "Residual",
    "SkipInit",
    "Transition",
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "WeightedAdd",
    "WideBlock",
    "ZeroInit",
    "average_downsample",
    "blur_downsample",
    "cbam",
    "create_model",
    "draw_like_torch",
    "freeze_norm",
    "from_config",
    "gated",
    "group_norm",
    "init_weights",
    "instance_norm",
    "list_models",
    "residuals",
    "set_skip",
    "skips_off",
    "to_config",
    "weight_standardised",
]
