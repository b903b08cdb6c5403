"""The names of transformers, MONAI, pytorchcv and torchvision's video nets: each is the call that builds the net."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resblocks.attention import SE
from resblocks.blocks import BasicBlock, Bottleneck
from resblocks.interop.names import R10, R26, R200, TIMM, TORCHVISION
from resblocks.interop.video import FactorisedBlock, factorised_stem, spatial_convolution, video_stem
from resblocks.layers import Stride, max_pool, named
from resblocks.models import (
    MODELS,
    R18,
    R34,
    R50,
    R101,
    R152,
    Build,
    basic_resnet,
    bottleneck_resnet,
    cifar_densenet,
    cifar_preact_bottleneck_resnet,
    cifar_preact_resnet,
    cifar_resnet,
    cifar_resnext,
    grid,
    resnext,
    small_resnet,
    wide_resnet,
)
from resblocks.nets import DenseNet, ResNet
from resblocks.options import BlockLayers, Layers, with_layers
from resblocks.protocol import Block
from resblocks.shortcuts import ZeroPad

# --- the parts in which these nets differ from the papers'


@with_layers
def unstrided_stem(make: Layers, in_channels: int, width: int) -> nn.Module:
    """The ImageNet stem with a stride in the pool alone: MONAI's, unless it is told `conv1_t_stride=2`."""
    pool = make.build(max_pool, 3, stride=2, padding=1)
    return named(conv=make.conv(in_channels, width, 7), norm=make.norm(width), act=make.activation(), pool=pool)


@with_layers
def biased_projection(make: BlockLayers, in_channels: int, out_channels: int, stride: Stride) -> nn.Module:
    """Option B whose convolution has a bias although a norm follows: MONAI's default, its `bias_downsample`."""
    if make.keeps_shape(in_channels, out_channels, stride):
        return nn.Identity()
    pool = make.pool(in_channels, stride)
    conv: Any = make.conv(in_channels, out_channels, 1, stride if pool is None else 1)
    conv.bias = nn.Parameter(torch.zeros(out_channels, device=conv.weight.device, dtype=conv.weight.dtype))
    return named(pool=pool, conv=conv, norm=make.norm(out_channels))


class CentredPad(ZeroPad):
    """Option A with half of the zeros before the old channels, as in akamaster/pytorch_resnet_cifar10."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(self.new_channels // 2, 1)


@with_layers
def centred_padding(make: BlockLayers, in_channels: int, out_channels: int, stride: Stride) -> nn.Module:
    """`CentredPad` where the shape changes: `create_model("resnet20", shortcut=centred_padding)`."""
    if make.keeps_shape(in_channels, out_channels, stride):
        return nn.Identity()
    pool = make.pool(in_channels, stride)
    pad = CentredPad(in_channels, out_channels, stride if pool is None else 1)
    return pad if pool is None else named(pool=pool, pad=pad)


# --- the tables

R3333 = (3, 3, 3, 3)
MIXED: tuple[Block, ...] = (BasicBlock, *[partial(BasicBlock, conv=spatial_convolution)] * 3)
OF_VIDEOS: dict[str, Any] = {"dims": 3, "num_classes": 400}
VIDEO: dict[str, Build] = {
    "r3d_18": basic_resnet(R18, stem=video_stem, **OF_VIDEOS),
    "mc3_18": basic_resnet(R18, block=MIXED, strides=(1, *[(1, 2, 2)] * 3), stem=video_stem, **OF_VIDEOS),
    "r2plus1d_18": basic_resnet(R18, block=FactorisedBlock, stem=factorised_stem, **OF_VIDEOS),
}

TRANSFORMERS: dict[str, Build] = {
    "resnet-18": basic_resnet(R18),
    "resnet-26": bottleneck_resnet(R26),
    "resnet-34": basic_resnet(R34),
    "resnet-50": bottleneck_resnet(R50),
    "resnet-101": bottleneck_resnet(R101),
    "resnet-152": bottleneck_resnet(R152),
}

# As MONAI builds them for the weights of MedicalNet (Chen et al. 2019): volumes of one channel, no head, shortcut A in
# two of them.
VOLUME: dict[str, Any] = {"dims": 3, "in_channels": 1, "num_classes": 0}
MONAI: dict[str, Build] = {
    "resnet10": basic_resnet(R10, **VOLUME),
    "resnet18": basic_resnet(R18, **VOLUME, shortcut="A"),
    "resnet34": basic_resnet(R34, **VOLUME, shortcut="A"),
    "resnet50": bottleneck_resnet(R50, **VOLUME),
    "resnet101": bottleneck_resnet(R101, **VOLUME),
    "resnet152": bottleneck_resnet(R152, **VOLUME),
    "resnet200": bottleneck_resnet(R200, **VOLUME),
    **{name: partial(MODELS[name], dims=3, in_channels=1) for name in ("densenet121", "densenet169", "densenet201")},
    "densenet264": partial(DenseNet, growth_rate=32, depths=(6, 12, 64, 48), dims=3, in_channels=1),
}

# Of pytorchcv 0.0.74.
CV_SE: dict[str, Any] = {"attention": partial(SE, min_hidden=1)}
CV_BASIC = {"10": R10, "12": (2, 1, 1, 1), "14": (2, 2, 1, 1), "16": (2, 2, 2, 1), "18": R18, "26": R3333, "34": R34}
CV_BOTTLENECK = {"bc26b": R26, "bc38b": R3333, "50b": R50, "101b": R101, "152b": R152, "200b": R200}
CV_STRIDE_FIRST = {"50": R50, "101": R101, "152": R152, "200": R200}


def imagenet_family(prefix: str, **options: Any) -> dict[str, Build]:
    """One family of ImageNet nets: basic blocks, bottlenecks, and those with the stride on the first 1x1."""
    stride_first = partial(Bottleneck, stride_first=True)
    return {
        **{f"{prefix}{name}": basic_resnet(depths, **options) for name, depths in CV_BASIC.items()},
        **{f"{prefix}{name}": bottleneck_resnet(depths, **options) for name, depths in CV_BOTTLENECK.items()},
        **{
            f"{prefix}{name}": bottleneck_resnet(depths, block=stride_first, **options)
            for name, depths in CV_STRIDE_FIRST.items()
        },
    }


def cifar_bottleneck_resnet(depth: int, **options: Any) -> ResNet:
    """The CIFAR ResNet of 9n + 2 layers with bottlenecks, after its pre-activation twin (He et al. 2016, table 4)."""
    return small_resnet(Bottleneck, grid(depth, 9, 2), (64, 128, 256), **options)


def cifar_family(prefix: str, basic: Build, bottleneck: Build, **options: Any) -> dict[str, Build]:
    """One family of CIFAR nets: basic blocks at four depths, bottlenecks at the others."""
    return {
        **{f"{prefix}{depth}": partial(basic, depth, **options) for depth in (20, 56, 110, 1202)},
        **{f"{prefix}{depth}bn": partial(bottleneck, depth, **options) for depth in (164, 272, 542)},
        f"{prefix}1001": partial(bottleneck, 1001, **options),
    }


def compressed_densenet(depth: int, growth_rate: int) -> Build:
    """A plain DenseNet that has the stem and the compression of DenseNet-BC."""
    how: dict[str, Any] = {"bottleneck": False, "compression": 0.5, "stem_width": 2 * growth_rate}
    return partial(cifar_densenet, depth, growth_rate, **how)


CV_CIFAR: dict[str, Build] = {
    **cifar_family("resnet", cifar_resnet, cifar_bottleneck_resnet, shortcut="B"),
    **cifar_family("preresnet", cifar_preact_resnet, cifar_preact_bottleneck_resnet),
    **cifar_family("seresnet", cifar_resnet, cifar_bottleneck_resnet, shortcut="B", **CV_SE),
    "resnext20_16x4d": partial(cifar_resnext, 20, 16, 4),
    "resnext20_32x2d": partial(cifar_resnext, 20, 32, 2),
    "resnext20_32x4d": partial(cifar_resnext, 20, 32, 4),
    **{name: MODELS[name] for name in ("resnext29_32x4d", "resnext29_16x64d")},
    "resnext272_1x64d": partial(cifar_resnext, 272, 1, 64),
    "resnext272_2x32d": partial(cifar_resnext, 272, 2, 32),
    "wrn16_10": partial(wide_resnet, 16, 10),
    "wrn28_10": partial(wide_resnet, 28, 10),
    "wrn40_8": partial(wide_resnet, 40, 8),
    "densenet40_k12": compressed_densenet(40, 12),
    "densenet100_k12": compressed_densenet(100, 12),
    "densenet100_k24": compressed_densenet(100, 24),
    "densenet40_k12_bc": partial(cifar_densenet, 40, 12),
    "densenet40_k24_bc": partial(cifar_densenet, 40, 24),
    "densenet40_k36_bc": partial(cifar_densenet, 40, 36),
    "densenet100_k12_bc": partial(cifar_densenet, 100, 12),
    "densenet190_k40_bc": partial(cifar_densenet, 190, 40),
    "densenet250_k24_bc": partial(cifar_densenet, 250, 24),
}
CV_CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10}
PYTORCHCV: dict[str, Build] = {
    **imagenet_family("resnet"),
    "resnetbc14b": bottleneck_resnet(R10),
    **imagenet_family("seresnet", **CV_SE),
    "resnext14_16x4d": resnext(R10, 16, 4),
    "resnext14_32x2d": resnext(R10, 32, 2),
    "resnext14_32x4d": resnext(R10, 32, 4),
    "resnext26_16x4d": resnext(R26, 16, 4),
    "resnext26_32x2d": resnext(R26, 32, 2),
    "resnext26_32x4d": resnext(R26, 32, 4),
    "resnext38_32x4d": resnext(R3333, 32, 4),
    "resnext50_32x4d": resnext(R50, 32, 4),
    "resnext101_32x4d": resnext(R101, 32, 4),
    "resnext101_64x4d": resnext(R101, 64, 4),
    "seresnext50_32x4d": resnext(R50, 32, 4, **CV_SE),
    "seresnext101_32x4d": resnext(R101, 32, 4, **CV_SE),
    "seresnext101_64x4d": resnext(R101, 64, 4, **CV_SE),
    **{name: MODELS[name] for name in ("densenet121", "densenet161", "densenet169", "densenet201")},
    **{
        f"{name}_{images}": partial(build, num_classes=classes)
        for name, build in CV_CIFAR.items()
        for images, classes in CV_CLASSES.items()
    },
}

# By the vocabulary that its nets speak.
NAMES: dict[str, dict[str, Build]] = {
    "torchvision": TORCHVISION,
    "torchvision.video": VIDEO,
    "timm": TIMM,
    "transformers": TRANSFORMERS,
    "monai": MONAI,
    "pytorchcv": PYTORCHCV,
}
