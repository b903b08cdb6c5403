"""The names of torchvision and timm that our blocks can say: each is one line of data, the call that builds the net."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from resblocks.attention import ECA, SE
from resblocks.layers import BlurPool, WSConv2d, group_norm, named
from resblocks.models import (
    BOTTLENECK,
    MODELS,
    R18,
    R34,
    R50,
    R101,
    R152,
    Build,
    basic_resnet,
    bottleneck_resnet,
    preact_basic_resnet,
    preact_bottleneck_resnet,
    resnext,
)
from resblocks.nets import DenseNet
from resblocks.options import Layers, with_layers

# --- the parts in which timm's nets differ from the papers'


@with_layers
def conv_pool(make: Layers, channels: int, stride: int) -> nn.Module:
    """A strided 3x3 convolution in place of the stem's pool (ResNet-RS, Bello et al. 2021)."""
    return named(conv=make.conv(channels, channels, 3, stride), norm=make.norm(channels), act=make.activation())


def zero_border_pool(channels: int, stride: int) -> nn.Module:
    """Max-pool that sees zeros beyond the map, not minus infinity (BiT, Kolesnikov et al. 2020)."""
    return named(border=nn.ConstantPad2d(1, 0.0), pool=nn.MaxPool2d(3, stride))


def average(channels: int, stride: int) -> nn.Module:
    """Average pool of windows as large as the stride."""
    return nn.AvgPool2d(stride)


def blur(channels: int, stride: int) -> nn.Module:
    """Blur pool that reflects the map at its border."""
    return BlurPool(channels, stride, border="reflect")


def blurred_max_pool(channels: int, stride: int) -> nn.Module:
    """Max-pool at every position, then a blur pool (Zhang 2019, fig. 3)."""
    return named(pool=nn.MaxPool2d(3, 1, padding=1), blur=blur(channels, stride))


@with_layers
def strided_projection(make: Layers, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Option B whose convolution keeps its stride in a net that reduces the resolution by pools elsewhere."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return named(conv=make.conv(in_channels, out_channels, 1, stride), norm=make.norm(out_channels))


# --- the words of the table

R10, R200, R269 = (1, 1, 1, 1), (3, 24, 36, 3), (3, 30, 48, 8)
R26 = R18
C: dict[str, Any] = {"stem": "deep"}
S: dict[str, Any] = {"stem": "deep", "stem_width": 128}
D: dict[str, Any] = {"stem": "deep", "shortcut": "D"}
T: dict[str, Any] = {"stem": "tiered", "shortcut": "D"}
RS: dict[str, Any] = {**D, "stem_pool": conv_pool, "attention": partial(SE, reduction=4)}
AA: dict[str, Any] = {"downsample": average, "stem_pool": average}
BLUR: dict[str, Any] = {"downsample": blur, "stem_pool": blurred_max_pool}
GN = partial(group_norm, groups=32)  # also where that leaves a group one channel
BIT: dict[str, Any] = {"conv": partial(WSConv2d, eps=1e-8), "norm": GN, "stem_pool": zero_border_pool}


def bit(depths: tuple[int, ...], factor: int) -> Build:
    """A net of BiT, all its widths times a factor."""
    return preact_bottleneck_resnet(
        depths, widths=tuple(factor * width for width in BOTTLENECK), stem_width=factor * 64, **BIT
    )


TORCHVISION: dict[str, Build] = {
    name: MODELS[name]
    for name in (
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
        *("densenet121", "densenet161", "densenet169", "densenet201"),
    )
}

TIMM: dict[str, Build] = {
    **TORCHVISION,
    "resnet10t": basic_resnet(R10, **T),
    "resnet14t": bottleneck_resnet(R10, **T),
    "resnet18d": basic_resnet(R18, **D),
    "resnet26": bottleneck_resnet(R26),
    "resnet26d": bottleneck_resnet(R26, **D),
    "resnet26t": bottleneck_resnet(R26, **T),
    "resnet34d": basic_resnet(R34, **D),
    "resnet50c": bottleneck_resnet(R50, **C),
    "resnet50d": bottleneck_resnet(R50, **D),
    "resnet50s": bottleneck_resnet(R50, **S),
    "resnet50t": bottleneck_resnet(R50, **T),
    "resnet50_gn": bottleneck_resnet(R50, norm=GN),
    "resnet101c": bottleneck_resnet(R101, **C),
    "resnet101d": bottleneck_resnet(R101, **D),
    "resnet101s": bottleneck_resnet(R101, **S),
    "resnet152c": bottleneck_resnet(R152, **C),
    "resnet152d": bottleneck_resnet(R152, **D),
    "resnet152s": bottleneck_resnet(R152, **S),
    "resnet200": bottleneck_resnet(R200),
    "resnet200d": bottleneck_resnet(R200, **D),
    "resnext50d_32x4d": resnext(R50, 32, 4, **D),
    "resnext101_32x4d": resnext(R101, 32, 4),
    "resnext101_32x16d": resnext(R101, 32, 16),
    "resnext101_32x32d": resnext(R101, 32, 32),
    "resnetrs50": bottleneck_resnet(R50, **RS),
    "resnetrs101": bottleneck_resnet(R101, **RS),
    "resnetrs152": bottleneck_resnet(R152, **RS),
    "resnetrs200": bottleneck_resnet(R200, **RS),
    "resnetrs270": bottleneck_resnet((4, 29, 53, 4), **RS),
    "resnetrs350": bottleneck_resnet((4, 36, 72, 4), **RS),
    "resnetrs420": bottleneck_resnet((4, 44, 87, 4), **RS),
    "resnetblur18": basic_resnet(R18, **BLUR, shortcut=strided_projection),
    "resnetblur50": bottleneck_resnet(R50, **BLUR, shortcut=strided_projection),
    "resnetblur50d": bottleneck_resnet(R50, **BLUR, **D),
    "resnetblur101d": bottleneck_resnet(R101, **BLUR, **D),
    "resnetaa34d": basic_resnet(R34, **AA, **D),
    "resnetaa50": bottleneck_resnet(R50, **AA, shortcut=strided_projection),
    "resnetaa50d": bottleneck_resnet(R50, **AA, **D),
    "resnetaa101d": bottleneck_resnet(R101, **AA, **D),
    "seresnet18": basic_resnet(R18, attention=SE),
    "seresnet34": basic_resnet(R34, attention=SE),
    "seresnet50": bottleneck_resnet(R50, attention=SE),
    "seresnet50t": bottleneck_resnet(R50, **T, attention=SE),
    "seresnet101": bottleneck_resnet(R101, attention=SE),
    "seresnet152": bottleneck_resnet(R152, attention=SE),
    "seresnet152d": bottleneck_resnet(R152, **D, attention=SE),
    "seresnet200d": bottleneck_resnet(R200, **D, attention=SE),
    "seresnet269d": bottleneck_resnet(R269, **D, attention=SE),
    "seresnetaa50d": bottleneck_resnet(R50, **AA, **D, attention=SE),
    "seresnext26d_32x4d": resnext(R26, 32, 4, **D, attention=SE),
    "seresnext26t_32x4d": resnext(R26, 32, 4, **T, attention=SE),
    "seresnext50_32x4d": resnext(R50, 32, 4, attention=SE),
    "seresnext101_32x4d": resnext(R101, 32, 4, attention=SE),
    "seresnext101_32x8d": resnext(R101, 32, 8, attention=SE),
    "seresnext101d_32x8d": resnext(R101, 32, 8, **D, attention=SE),
    "seresnext101_64x4d": resnext(R101, 64, 4, attention=SE),
    "seresnextaa101d_32x8d": resnext(R101, 32, 8, **AA, **D, attention=SE),
    "seresnextaa201d_32x8d": resnext((3, 24, 36, 4), 32, 8, **AA, **D, stem_width=128, attention=SE),
    "ecaresnet26t": bottleneck_resnet(R26, **T, attention=ECA),
    "ecaresnet50d": bottleneck_resnet(R50, **D, attention=ECA),
    "ecaresnet50t": bottleneck_resnet(R50, **T, attention=ECA),
    "ecaresnet101d": bottleneck_resnet(R101, **D, attention=ECA),
    "ecaresnet200d": bottleneck_resnet(R200, **D, attention=ECA),
    "ecaresnet269d": bottleneck_resnet(R269, **D, attention=ECA),
    "ecaresnetlight": bottleneck_resnet((1, 1, 11, 3), shortcut="D", attention=ECA),
    "ecaresnext26t_32x4d": resnext(R26, 32, 4, **T, attention=ECA),
    "ecaresnext50t_32x4d": resnext(R50, 32, 4, **T, attention=ECA),
    "resnetv2_18": preact_basic_resnet(R18),
    "resnetv2_18d": preact_basic_resnet(R18, **D),
    "resnetv2_34": preact_basic_resnet(R34),
    "resnetv2_34d": preact_basic_resnet(R34, **D),
    "resnetv2_50": preact_bottleneck_resnet(R50),
    "resnetv2_50d": preact_bottleneck_resnet(R50, **D),
    "resnetv2_50t": preact_bottleneck_resnet(R50, **T),
    "resnetv2_50d_gn": preact_bottleneck_resnet(R50, **D, norm=GN),
    "resnetv2_101": preact_bottleneck_resnet(R101),
    "resnetv2_101d": preact_bottleneck_resnet(R101, **D),
    "resnetv2_152": preact_bottleneck_resnet(R152),
    "resnetv2_152d": preact_bottleneck_resnet(R152, **D),
    "resnetv2_50x1_bit": bit(R50, 1),
    "resnetv2_50x3_bit": bit(R50, 3),
    "resnetv2_101x1_bit": bit(R101, 1),
    "resnetv2_101x3_bit": bit(R101, 3),
    "resnetv2_152x2_bit": bit(R152, 2),
    "resnetv2_152x4_bit": bit(R152, 4),
    "densenet264d": partial(DenseNet, growth_rate=48, depths=(6, 12, 64, 48), stem="deep"),
    "densenetblur121d": partial(
        DenseNet, growth_rate=32, depths=(6, 12, 24, 16), stem="deep", stem_pool=blurred_max_pool
    ),
}

# The residual names of timm that are out, as shell patterns, and why.
TIMM_OUT: dict[str, str] = {
    "*_pruned": "widths differ from block to block",
    "senet154": "its first 1x1 has half the width, its shortcuts are 3x3: one net, no paper's figure",
    "legacy_se*": "the older files of the se names, with Caffe's strides and pools",
    "resnetv2_50d_evos": "EvoNorm is norm and activation in one",
    "resnetv2_50d_frn": "filter response norm is norm and activation in one",
    "test_resnet": "a net for timm's tests, with another block in each stage",
    "skresnet*": "selective kernels: two branches that attend to each other",
    "skresnext*": "selective kernels: two branches that attend to each other",
    "resnest*": "split attention inside the 3x3",
    "res2net*": "a hierarchy of 3x3 convolutions inside the bottleneck",
    "res2next*": "a hierarchy of 3x3 convolutions inside the bottleneck",
    "regnet*": "the group count differs from stage to stage; attention sits inside the branch",
    "rexnet*": "linear bottlenecks that add to a part of the channels",
    "resnet*_clip*": "CLIP's stem and attention pool",
    "resnet*q": "ResNet-Q: another stem and shortcuts of BYOB",
    "*resne*ts*": "BYOB's stems and self-attention",
    "gcresne*": "BYOB's nets with global context attention",
    "lambda_resnet*": "BYOB's nets with lambda layers",
    "resnet50_mlp": "BYOB's head with a hidden layer",
    "nf_*resne*": "normalizer-free: scaled activations in place of norms",
    "cspresne*": "cross-stage partial: each stage splits its channels",
    "tresnet*": "TResNet: space-to-depth stem, other blocks in the later stages",
    "rdnet*": "DenseNet in the manner of ConvNeXt",
}
