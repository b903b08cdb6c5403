"""Composable residual blocks for PyTorch, each with a skip switch, and the networks made of them."""

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
from resblocks.init import init_weights
from resblocks.models import create_model, list_models
from resblocks.nets import BaselineCNN, DenseNet, Network, ResNet
from resblocks.residual import Add, Concat, Residual, residuals, set_skip, skips_off

__version__ = "0.1.0"

__all__ = [
    "Add",
    "BaselineCNN",
    "BasicBlock",
    "Bottleneck",
    "Concat",
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "Network",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ResNeXtBlock",
    "ResNet",
    "Residual",
    "Transition",
    "WideBlock",
    "create_model",
    "init_weights",
    "list_models",
    "residuals",
    "set_skip",
    "skips_off",
]
